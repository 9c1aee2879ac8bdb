"""The small runs that the previous version began, finished and converted: how they are made.

golden/previous_version/record_runs.py lets that version make them and go on with them;
test_previous_version.py lets this one go on.
"""

import json
from pathlib import Path

import torch
from noisy_colours import write_images
from tiny_voc import write_tiny_config, write_tiny_voc

_PRETRAIN = [
    "pretrain/main.py", "data", "--image-size", "32", "-b", "16", "--bn-groups", "2",
    "--moco-dim", "8", "--epochs", "3", "-j", "0", "--seed", "7", "-p", "1", "--lr", "1e-4",
    "--knn-every", "0",
]  # fmt: skip
_CLASSIFY = [
    "pretrain/linear.py", "data", "-a", "resnet18w0.25x", "--image-size", "32", "-b", "16",
    "--schedule", "2", "-j", "0", "--seed", "7", "-p", "1", "--save-steps", "1", "--epochs", "2",
    "--pretrained", "end-to-end/checkpoint_last.pth.tar",
]  # fmt: skip
_DETECT = [
    "tools/train_net.py", "--config-file", "tiny.yaml", "--engine", "native",
]  # fmt: skip
_DETECTOR_OPTS = [
    "MODEL.WEIGHTS", "moco.pkl", "INPUT.FORMAT", "RGB",
    "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]",
    "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]",
]  # fmt: skip

# Run folder -> the command; each is killed or ended after its second step, within an epoch.
COMMANDS = {
    "moco": [
        *_PRETRAIN, "-a", "resnet50w0.25x", "--mlp", "--aug-plus", "--cos", "--moco-k", "40",
        "--output", "moco",
    ],
    "end-to-end": [
        *_PRETRAIN, "-a", "resnet18w0.25x", "--mechanism", "end-to-end", "--output", "end-to-end",
    ],
    "memory-bank": [
        *_PRETRAIN, "-a", "resnet18w0.25x", "--mechanism", "memory-bank", "--loss", "nce",
        "--moco-k", "20", "--output", "memory-bank",
    ],
    "linear": [*_CLASSIFY, "--lr", "0.1", "--output", "linear"],
    "finetuning": [*_CLASSIFY, "--lr", "1e-4", "--finetune", "--output", "finetuning"],
    "detector": [*_DETECT, *_DETECTOR_OPTS, "OUTPUT_DIR", "detector"],
}  # fmt: skip
PRETRAINED = ("moco", "end-to-end", "memory-bank")
CONVERT = ["tools/convert_to_d2.py", "moco/checkpoint_last.pth.tar"]
METRICS = {"detector": "metrics.json"}  # the others have metrics.jsonl


def write_data(folder: Path) -> None:
    """What the commands read beside the runs; they are given names relative to `folder`."""
    write_images(folder / "data")
    write_tiny_voc(folder / "voc", 6)
    write_tiny_config(folder / "tiny.yaml", Path("voc"))


def resume_command(run: str, checkout: Path) -> list[str]:
    """The command of a version's checkout that goes on with a run, for a few steps.

    In float64, or what is compared would be the rounding of networks that have learnt nothing. The
    detector, which is float32 throughout, takes one step only, and keeps that step's statistics.
    """
    if run == "detector":
        opts = ("SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0", "TEST.PRECISE_BN.ENABLED", "False")
        script, *flags = [*_DETECT, "--resume", *_DETECTOR_OPTS, *opts, "OUTPUT_DIR", "detector"]
        return [str(checkout / script), *flags]
    script, *flags = [*COMMANDS[run], "--resume", "auto"]
    if run in PRETRAINED:
        flags += ["--iterations", "5"]
    return [str(Path(__file__).with_name("float64.py")), str(checkout / script), *flags]


def read_metrics(folder: Path, run: str) -> list[dict]:
    path = folder / run / METRICS.get(run, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder: Path, run: str, lines_before: int) -> dict:
    """What a resumed run has come to.

    Returns:
        "losses": of the steps after the resumption. "norms": by name, of every floating array of
        the last checkpoint, model, loss and optimizer alike. "values": its integers.
    """
    added = read_metrics(folder, run)[lines_before:]
    key = "total_loss" if run == "detector" else "loss"
    last = folder / run / ("model_final.pth" if run == "detector" else "checkpoint_last.pth.tar")
    norms, values = {}, {}
    for name, value in _leaves(torch.load(last, weights_only=True)):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            norms[name] = float(f"{value.double().norm():.7g}")
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = value
    return {
        "losses": [line[key] for line in added if key in line],
        "norms": norms,
        "values": values,
    }


def _leaves(content, prefix: str = ""):
    """(name with the keys to it, value) of nested dicts and lists, without generators' states."""
    if isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            if "rng" not in str(key):
                yield from _leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, content
