"""The classes of inputs: whole files, a change in them, commands that meet them, what must come.

A subject has two functions, both run in children: `prepare(corpus)` writes whole files and what the
commands make of them, once; `attempt(rng, corpus, folder)` writes a changed file to `folder`, runs
commands on it, and returns a complaint, "" where all is well.
"""

import hashlib
import json
import math
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import yaml
from tiny_voc import write_tiny_config, write_tiny_voc

from tests.fuzz import mutations, pickles
from tests.fuzz.mutations import DUPLICATE, EXTRA, MISSING, described, mutate_bytes, mutate_tree
from tests.fuzz.sandbox import Step, canary, run_command


class Subject(NamedTuple):
    prepare: Callable[[Path], None]
    attempt: Callable[[random.Random, Path, Path], str]


def note(folder: Path, mutation: str) -> None:
    """Say what is changed, before a command can crash on it."""
    (folder / "mutation").write_text(mutation)


def command(folder: Path, script: str, *arguments: object, name: str = "") -> Step:
    """A command that must succeed. Raises RuntimeError where it does not."""
    step = run_command(folder, script, *arguments, name=name)
    if not step.accepted:
        raise RuntimeError(f"{script} has failed on whole files: {step.err[-2000:]}")
    return step


def odd_file(rng: random.Random, path: Path) -> str:
    """Put what is no regular file in the place of `path`; what it is."""
    path.unlink(missing_ok=True)
    kind = rng.choice(("a FIFO", "/dev/zero", "a folder", "a link to itself", "an empty file"))
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "an empty file":
        path.touch()
    else:
        path.symlink_to(path if kind == "a link to itself" else "/dev/zero")
    return kind


# -- what a command has made ----------------------------------------------------------------------


def digest(path: Path) -> str:
    """Of all tensors and numbers in a file of weights; "not finite" where one is not."""
    content = pickle.loads(path.read_bytes()) if path.suffix == ".pkl" else _load(path)
    known, finite = hashlib.sha256(), True
    for name, value in sorted(_leaves(content), key=lambda leaf: leaf[0]):
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if isinstance(value, torch.Tensor):
            finite &= bool(value.isfinite().all())
            known.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            known.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, int | float):
            finite &= math.isfinite(value)
            known.update(f"{name}{value}".encode())
    return known.hexdigest() if finite else "not finite"


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _leaves(tree: Any, prefix: str = ""):
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            if prefix or key != "config":
                yield from _leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, tree


def complaint(step: Step, must: str, result: Path | None = None, whole: Path | None = None) -> str:
    """What is wrong with a step, given what the input must lead to.

    Args:
        must: "refuse"; "same" result or refused; "accept"; or "any" result that is finite.
        result: the file of weights that the step has made, `whole` that of the whole input.
    """
    if not step.accepted:
        said = step.message or step.exception
        return f"{step.name} refused what is whole: {said}" if must == "accept" else ""
    if must == "refuse":
        return f"{step.name} accepted it"
    if result is not None:
        found = digest(result)
        if found == "not finite":
            return f"{step.name} accepted it, and the result is not finite"
        if must in ("same", "accept") and whole and found != digest(whole):
            return f"{step.name} accepted it, and the result is not that of the whole file"
    return ""


# -- checkpoints ----------------------------------------------------------------------------------

PRETRAIN = "pretrain/main.py"
MOCO = [
    "-a", "resnet50w0.25x", "--image-size", "32", "-b", "4", "--moco-k", "8", "--moco-dim", "8",
    "-j", "0", "--seed", "7", "-p", "1", "--knn-every", "0", "--epochs", "9", "--keep", "1",
]  # fmt: skip
LAST = "checkpoint_last.pth.tar"
TRAIN = "tools/train_net.py"
NATIVE = ("--engine", "native")
SHORT = ["SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0", "TEST.PRECISE_BN.ENABLED",
         "False", "SOLVER.STEPS", "()"]  # fmt: skip


def write_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3))
                cv2.imwrite(str(folder / part / label / f"{i}.png"), pixels.astype(np.uint8))
    return folder


def prepare_checkpoints(corpus: Path) -> None:
    images, moco = write_images(corpus / "images"), corpus / "moco"
    command(corpus, PRETRAIN, images, *MOCO, "--iterations", 1, "--output", moco)
    shutil.copy(moco / LAST, corpus / "moco.pth.tar")
    command(corpus, PRETRAIN, images, *MOCO, "--iterations", 2, "--output", moco,
            "--resume", "auto", name="resume")  # fmt: skip
    convert = "tools/convert_to_d2.py"
    command(corpus, convert, corpus / "moco.pth.tar", corpus / "d2.pkl")
    command(corpus, convert, corpus / "d2.pkl", corpus / "tv.pth", "--to", "torchvision",
            name="back")  # fmt: skip
    voc = write_tiny_voc(corpus / "voc", images=3)
    config = write_tiny_config(corpus / "detector.yaml", voc)
    detector, every = corpus / "detector", ["SOLVER.CHECKPOINT_PERIOD", "1"]
    options = [*SHORT, *every, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", detector]
    command(corpus, TRAIN, *NATIVE, "--config-file", config, *options)


def attempt_checkpoint(rng: random.Random, corpus: Path, folder: Path) -> str:
    use = rng.choices(("convert", "knn", "resume", "detector"), (5, 2, 2, 1))[0]
    whole = corpus / ("detector/model_0000000.pth" if use == "detector" else "moco.pth.tar")
    changed = folder / ("model_0000000.pth" if use == "detector" else "a.pth.tar")
    mutation, must = change_checkpoint(rng, whole, changed, folder, use)
    note(folder, f"{use}: {mutation}")
    if use == "convert":
        step = run_command(folder, "tools/convert_to_d2.py", changed, folder / "out.pkl")
        return complaint(step, must, folder / "out.pkl", corpus / "d2.pkl")
    images = corpus / "images"
    if use == "knn":
        step = run_command(folder, "pretrain/knn.py", images, "-a", "resnet50w0.25x", "-k", 2,
                           "--image-size", 32, "-j", 0, "--pretrained", changed)  # fmt: skip
        return complaint(step, must)
    if use == "resume":
        step = run_command(folder, PRETRAIN, images, *MOCO, "--iterations", 2,
                           "--output", folder / "run", "--resume", changed)  # fmt: skip
        return complaint(step, must, folder / "run" / LAST, corpus / "moco" / LAST)
    (folder / "last_checkpoint").write_text(changed.name)
    step = run_command(folder, TRAIN, *NATIVE, "--resume", "--config-file",
                       corpus / "detector.yaml", *SHORT, "SOLVER.MAX_ITER", 2,
                       "OUTPUT_DIR", folder)  # fmt: skip
    return complaint(step, must, folder / "model_final.pth", corpus / "detector/model_final.pth")


def change_checkpoint(
    rng: random.Random, whole: Path, changed: Path, folder: Path, use: str
) -> tuple[str, str]:
    """Write the changed file; (what was done, what must come of it)."""
    kind = rng.choices(("bytes", "value", "tensor", "opcodes", "odd", "none"), (7, 7, 5, 6, 1, 1))[
        0
    ]
    if kind == "none":
        shutil.copy(whole, changed)
        return "unchanged", "accept"
    if kind == "odd":
        return odd_file(rng, changed), "refuse"
    if kind == "bytes":
        data, what = mutate_bytes(rng, whole.read_bytes())
        changed.write_bytes(data)
        return what, "same"
    if kind == "opcodes":
        what, must = change_zipped_pickle(rng, whole, changed, folder)
        return what, must
    state = _load(whole)
    weights = "model" if use == "detector" else "state_dict"
    if kind == "tensor":
        names = [name for name in state[weights] if use == "resume" or "encoder_k" not in name]
        name = rng.choice(names)
        what, state[weights][name], must = odd_tensor(rng, name, state[weights][name])
        unused = use in ("convert", "knn") and ("encoder_q" not in name or ".fc." in name)
        must = "any" if unused else must
    else:
        top = [key for key in state if key != weights] + [weights] * (rng.random() < 0.1)
        key = rng.choice([key for key in top if key in state])
        paths = [(key,), *((key, *path) for path in mutations.walk(state[key]))]
        original = state
        state, path, value = mutate_tree(rng, state, paths)
        what = described(path, value)
        must = resumable(path, value, original) if use in ("resume", "detector") else "any"
    torch.save(state, changed)
    return what, must


def resumable(path: Sequence, value: Any, state: dict) -> str:
    """What must come of resuming a checkpoint with this value at this path."""
    if value is EXTRA or value is DUPLICATE or path[0] == "config":
        return "any"
    if value is MISSING:
        return "refuse" if len(path) > 1 and path[0] in ("optimizer", "rng") else "any"
    old = mutations.at(state, path)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return "any"
    if type(value) is not type(old):
        return "refuse"
    if isinstance(value, int | float) and not (math.isfinite(value) and 0 <= value < 2**31):
        return "refuse"
    return "refuse" if value == {} and path == ("optimizer", "state") else "any"


def odd_tensor(rng: random.Random, name: str, tensor: torch.Tensor) -> tuple[str, Any, str]:
    """(what it is, a tensor in the place of another, what must come of it)."""
    ones, floating = torch.ones(tensor.shape), tensor.is_floating_point()
    one_nan = tensor.clone().float()
    one_nan.view(-1)[rng.randrange(max(1, one_nan.numel()))] = rng.choice(mutations.NOT_FINITE)
    kinds: dict[str, tuple[Callable[[], Any], str]] = {
        "not finite": (lambda: one_nan, "refuse"),
        "integers": (lambda: ones.int(), "refuse" if floating else "any"),
        "booleans": (lambda: ones.bool(), "refuse"),
        "complex": (lambda: ones.to(torch.complex64), "refuse"),
        "sparse": (lambda: tensor.float().to_sparse(), "same"),
        "quantized": (lambda: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), "refuse"),
        "meta": (lambda: ones.to("meta"), "refuse"),
        "float8": (lambda: ones.to(torch.float8_e5m2), "any"),
        "of no width": (lambda: torch.empty(0, *tensor.shape), "refuse"),
        "of another shape": (lambda: torch.ones(*tensor.shape, 2), "refuse"),
        "float64": (lambda: tensor.double(), "same" if floating else "any"),
        "bfloat16": (lambda: tensor.bfloat16(), "any"),
        "float16": (lambda: tensor.half(), "any"),
        "expanded to gigabytes": (lambda: torch.ones(1).expand(1 << 33), "refuse"),
        "no tensor": (lambda: rng.choice((None, 1.0, "x", [])), "refuse"),
    }
    if name.endswith("running_var"):
        kinds["negative"] = (lambda: -ones, "refuse")
    what = rng.choice(sorted(kinds))
    make, must = kinds[what]
    return f"{name} {what}", make(), must


def change_zipped_pickle(
    rng: random.Random, whole: Path, changed: Path, folder: Path
) -> tuple[str, str]:
    """Change the pickle in a torch file, or put a payload into it; its checksums are right."""
    with zipfile.ZipFile(whole) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    (name,) = [name for name in entries if name.endswith("data.pkl")]
    must = "any"
    if rng.random() < 0.3:
        payloads = pickles.payloads(canary(folder))
        what = rng.choice(sorted(payloads))
        value, must = b"\x80\x02}" + pickles.plain("state_dict") + payloads[what] + b"s.", "refuse"
    else:
        value, what = pickles.mutate_opcodes(rng, entries[name])
    entries[name] = value
    inflated = rng.random() < 0.05
    with zipfile.ZipFile(changed, "w") as target:
        for entry, data in entries.items():
            bomb = inflated and "/data/0" in entry
            data = bytes(1 << 30) if bomb else data
            target.writestr(entry, data, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
    return what + (", and a gigabyte of zeros" if inflated else ""), must


# -- Detectron2's pickles -------------------------------------------------------------------------


def attempt_pickle(rng: random.Random, corpus: Path, folder: Path) -> str:
    changed, whole = folder / "a.pkl", corpus / "d2.pkl"
    kind = rng.choices(("opcodes", "attack", "payload", "bytes", "odd", "none"), (6, 6, 2, 4, 1, 1))
    must, what = "refuse", kind[0]
    if kind[0] == "none":
        shutil.copy(whole, changed)
        must = "accept"
    elif kind[0] == "odd":
        what = odd_file(rng, changed)
    elif kind[0] == "bytes":
        data, what = mutate_bytes(rng, whole.read_bytes())
        changed.write_bytes(data)
        must = "same"
    elif kind[0] == "opcodes":
        data, what = pickles.mutate_opcodes(rng, whole.read_bytes())
        changed.write_bytes(data)
        must = "any"
    else:
        arrays = pickle.loads(whole.read_bytes())["model"]
        name = rng.choice(sorted(name for name in arrays if "num_batches" not in name))
        attacks = pickles.attacks(arrays[name].shape)
        chosen = attacks if kind[0] == "attack" else pickles.payloads(canary(folder))
        what = rng.choice(sorted(chosen))
        changed.write_bytes(pickles.with_fragment(arrays, name, chosen[what]))
        must = "any" if what == "offset" and arrays[name].shape == (1,) else must
    use = rng.choices(("convert", "detector"), (8, 1))[0]
    note(folder, f"{use}: {what}")
    if use == "convert":
        step = run_command(folder, "tools/convert_to_d2.py", changed, folder / "out.pth",
                           "--to", "torchvision")  # fmt: skip
        return complaint(step, must, folder / "out.pth", corpus / "tv.pth")
    options = ["OUTPUT_DIR", folder / "run", "MODEL.WEIGHTS", changed]
    step = run_command(folder, TRAIN, *NATIVE, "--eval-only", "--config-file",
                       corpus / "detector.yaml", *options)  # fmt: skip
    return complaint(step, must)


# -- configs and recipes --------------------------------------------------------------------------

RECIPE = {
    "arch": "resnet50w0.25x", "image_size": 32, "batch_size": 4, "epochs": 2, "lr": 0.03,
    "weight_decay": 1e-4, "momentum": 0.9, "schedule": [1], "moco_k": 8, "moco_dim": 8,
    "moco_m": 0.99, "moco_t": 0.1, "mlp": True, "cos": False, "aug_plus": True, "workers": 0,
    "bn_groups": 1, "knn_every": 0, "print_freq": 1, "keep": 1, "seed": 1, "max_unreadable": 0.1,
}  # fmt: skip
ABLATION = {
    "base": RECIPE, "grid": {"moco_k": [8, 16], "moco_m": [0.9]}, "seeds": 2, "untrained": True,
    "knn": {"neighbours": 2}, "linear": {"lr": 0.1, "epochs": 2, "schedule": [1]},
}  # fmt: skip
RATES = {"lr", "weight_decay", "momentum", "moco_m", "moco_t", "max_unreadable", "BASE_LR"}


def documents(folder: Path, key: str) -> dict[str, str]:
    """Whole YAML files that must be refused; `key` is one of the mapping's own."""
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    mapping_bomb = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{b: *a{i - 1}, c: *a{i - 1}, d: *a{i - 1}}}\n" for i in range(1, 25)
    )
    code = f"open({str(canary(folder))!r}, 'w')"
    return {
        "alias bomb": f"{bomb}{key}: *a11\n",
        "bomb of mappings": f"{mapping_bomb}{key}: *a24\n",
        "recursion": f"&x\n{key}: *x\n",
        "recursive list": f"{key}: &x [*x]\n",
        "merge of itself": "&x\n<<: *x\n",
        "a date": f"{key}: 2020-99-99\n",
        "digits": f"{key}: {'9' * 5000}\n",
        "octal": f"{key}: 0o{'7' * 5000}\n",
        "binary": f"{key}: !!binary 'eA=='\n",
        "sexagesimal": f"{key}: {'1:' * 3000}1\n",
        "deep": f"{key}: {'[' * 20000}\n",
        "deep mapping": "".join(f"{' ' * i}a:\n" for i in range(1500)),
        "NUL": f"{key}: a\0b\n",
        "escaped NUL": f'{key}: "a\\0b"\n',
        "two documents": f"{key}: 1\n---\n{key}: 2\n",
        "a set": f"{key}: !!set {{a, b}}\n",
        "unknown tag": f"{key}: !x 1\n",
        "eval": f"{key}: !!python/object/apply:eval [{json.dumps(code)}]\n",
        "system": f"{key}: !!python/object/apply:os.system ['touch {canary(folder)}']\n",
        "unhashable key": "? [a, b]\n: 1\n",
        "numeric keys": "1: 2\n.nan: 3\n",
        "null key": "~: 1\n",
        "a list": "[1, 2]\n",
        "a string": "x\n",
        "its own base": '_BASE_: "a.yaml"\n',
        "a base of NUL": '_BASE_: "a\\0b"\n',
        "a base of numbers": "_BASE_: 5\n",
        "a recipe of NUL": 'recipe: "a\\0b"\n',
        "UTF-16": "\ufeffx: 1\n",
    }


def prepare_yaml(corpus: Path) -> None:
    write_images(corpus / "images")
    write_tiny_config(corpus / "detector.yaml", write_tiny_voc(corpus / "voc", images=3))


def attempt_yaml(rng: random.Random, corpus: Path, folder: Path) -> str:
    use = rng.choices(("check_data", "train", "recipe", "ablation"), (4, 1, 3, 3))[0]
    whole = {"recipe": RECIPE, "ablation": ABLATION}.get(use)
    whole = whole or yaml.safe_load((corpus / "detector.yaml").read_text())
    changed, must = folder / "a.yaml", "any"
    kind = rng.choices(("value", "bytes", "document", "odd", "none"), (10, 3, 4, 0.5, 0.5))[0]
    if kind == "document":
        key = {"recipe": "lr", "ablation": "grid"}.get(use, "SEED")
        texts = documents(folder, key)
        what, must = rng.choice(sorted(texts)), "refuse"
        changed.write_bytes(texts[what].encode("utf-16" if what == "UTF-16" else "utf-8"))
    elif kind == "odd":
        what = odd_file(rng, changed)
        must = "any" if what == "an empty file" else "refuse"
    elif kind == "bytes":
        data, what = mutate_bytes(rng, yaml.safe_dump(whole).encode())
        changed.write_bytes(data)
    elif kind == "none":
        what, must = "unchanged", "accept"
        changed.write_text(yaml.safe_dump(whole))
    else:
        tree, path, value = mutate_tree(rng, whole)
        what, rate = described(path, value), path[-1] in RATES
        bad = isinstance(value, float | int) and not (math.isfinite(value) and value >= 0)
        must = "refuse" if bad and rate else "any"
        changed.write_text(yaml.dump(tree))
    note(folder, f"{use}: {what}")
    if use in ("check_data", "train"):
        script = "tools/check_data.py" if use == "check_data" else TRAIN
        options = [*SHORT, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", folder / "run"]
        engine = NATIVE if use == "train" else ()
        step = run_command(folder, script, *engine, "--config-file", changed, *options)
    elif use == "recipe":
        step = run_command(folder, PRETRAIN, corpus / "images", "--recipe", changed,
                           "--iterations", 1, "--output", folder / "run")  # fmt: skip
    else:
        step = run_command(folder, "tools/ablate.py", changed, "--data", corpus / "images",
                           "--output", folder / "run", "--dry-run")  # fmt: skip
    if use == "check_data" and must == "refuse" and kind == "value":
        must = "any"  # rates are none of its business
    return complaint(step, must)


# -- run folders ----------------------------------------------------------------------------------

EXPERIMENTS = ("voc_R50_C4", "coco_R50_FPN_mask", "coco_R50_FPN_keypoint", "voc_R50_FCN16")
RUNS = [f"{e}/{row}/trial{n}" for e in EXPERIMENTS for row in ("random", "moco") for n in (1, 2)]


def prepare_runs(corpus: Path) -> None:
    """A toy reproduction as if it were finished, by hand; and the log of a pretraining."""
    voc = write_tiny_voc(corpus / "voc", images=6)
    config = yaml.safe_load(write_tiny_config(corpus / "config.yaml", voc).read_text())
    config["DATASETS"] = {"TRAIN": [f"voc:{voc}:train"], "TEST": [f"voc:{voc}:test"]}
    found = [
        {"image_id": f"{i:03d}", "boxes": [[4.0, 4.0, 20.0, 20.0]], "scores": [0.9], "classes": [0]}
        for i in (4, 5)
    ]
    name = "".join(c if c.isalnum() or c == "-" else "_" for c in f"voc:{voc}:test")
    about = {"code": {"commit": "abc"}, "packages": {"torch": "2"}, "hardware": {"host": "x"}}
    record = {"state": "finished", "command": "train", "attempts": [{"exit_code": 0}]}
    record |= {"identity": {"seed": 1}, "result": {}, "seconds": 1.0, "engine": "native"} | about
    for number, run in enumerate(RUNS):
        folder = corpus / "runs" / "runs" / run
        (folder / "inference").mkdir(parents=True)
        lines = [{"iteration": i, "lr": 0.1, "total_loss": 2.0 - i / 99} for i in (19, 39, 59)]
        task = "sem_seg/mIoU" if "FCN" in run else "bbox/AP"
        lines.append({"iteration": 60, task: 20.0 + number, "bbox/AP50": 40.0 + number})
        (folder / "metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "inference" / f"{name.replace('__', '_')}.json").write_text(json.dumps(found))
    images = write_images(corpus / "images")
    command(corpus, PRETRAIN, images, *MOCO, "--iterations", 4, "--output", corpus / "moco")
    for path in (corpus / "moco").glob("*.pth.tar"):
        path.unlink()


def attempt_run(rng: random.Random, corpus: Path, folder: Path) -> str:
    use = rng.choices(("status", "report", "dry-run", "compare", "doctor", "visualize"),
                      (3, 3, 2, 3, 2, 2))[0]  # fmt: skip
    output, damaged = folder / "runs", RUNS[rng.randrange(0, len(RUNS), 2)]
    shutil.copytree(corpus / "runs", output)
    run = output / "runs" / damaged
    file = {"compare": "metrics.json", "visualize": "inference"}.get(use)
    file = run / (file or rng.choice(("run.json", "metrics.json", "config.yaml", "inference")))
    if use == "doctor":
        shutil.copytree(corpus / "moco", folder / "moco")
        file = folder / "moco/metrics.jsonl"
    file = next(file.iterdir()) if file.name == "inference" else file
    what = change_record(rng, file)
    note(folder, f"{use}: {file.name} {what}")
    whole = what == "unchanged"
    if use == "doctor":
        run_command(folder, "pretrain/doctor.py", folder / "moco")
        return ""  # it may have something to say of the whole run, too
    if use == "visualize":
        step = run_command(folder, "tools/visualize.py", "--dataset", f"voc:{corpus / 'voc'}:test",
                           "--predictions", file, "--output", folder / "drawn")  # fmt: skip
        return complaint(step, "accept" if whole else "any")
    if use == "compare":
        step = run_command(folder, "tools/compare.py", f"bad={run}",
                           f"good={output / 'runs' / RUNS[1]}")  # fmt: skip
        return blocked(step, ["41.0"])
    mode = ["--quick", "--output", output, f"--{use}"]
    step = run_command(folder, "tools/reproduce.py", *mode)
    page = output / "report.md"
    others = [name for name in RUNS if name != damaged] if use == "status" else []
    if use == "report" and step.accepted and not page.exists():
        return "no report was written"
    return blocked(step, others)


def blocked(step: Step, others: Sequence[str]) -> str:
    """The complaint where one damaged run has kept a command from telling of the others."""
    if not step.accepted:
        return f"one damaged run blocks {step.name}: {step.message or step.exception}"
    lost = [name for name in others if name not in step.out]
    return f"{step.name} does not name {lost[0]}" if lost else ""


def change_record(rng: random.Random, file: Path) -> str:
    """Damage a file of a run: its bytes, or a value of its JSON lines or its YAML."""
    data = file.read_bytes()
    kind = rng.choices(("bytes", "value", "half", "NUL", "odd", "none"), (3, 5, 1, 1, 0.5, 0.3))[0]
    if kind == "none":
        return "unchanged"
    if kind == "odd":
        return odd_file(rng, file)
    if kind == "bytes":
        data, kind = mutate_bytes(rng, data)
    elif kind == "half":
        data += data[: len(data) // 3].rstrip(b"\n")
    elif kind == "NUL":
        data = bytes(len(data))
    elif file.suffix == ".yaml":
        tree, path, value = mutate_tree(rng, yaml.safe_load(data))
        data, kind = yaml.safe_dump(tree).encode(), described(path, value)
    else:
        lines = data.decode().splitlines()
        number = rng.randrange(len(lines))
        tree, path, value = mutate_tree(rng, json.loads(lines[number]))
        lines[number], kind = json.dumps(tree), described(path, value)
        data = ("\n".join(lines) + "\n").encode()
    file.write_bytes(data)
    return kind
