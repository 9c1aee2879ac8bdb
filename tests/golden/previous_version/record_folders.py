"""Record small output folders of an earlier version, for the tests that read them in this one.

    python tests/golden/previous_version/record_folders.py CHECKOUT-OF-THAT-VERSION

ablation/    one trial that is finished, and one that was stopped within its pretraining
reproduce/   `--quick` with one run of row random; draw.done beside it
Only the files that say what was run and what came of it are kept. Words in braces in them stand for
the paths of the machine that made them.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import yaml

from moco_det.common.resnets import Architecture
from moco_det.common.weight_layouts import rename

HERE = Path(__file__).parent
KEPT = ("trial.json", "result.json", "run.json", "metrics.json", "config.yaml", "*.done", "*.yaml")
ABLATION = {
    "base": {
        "arch": "resnet18w0.25x", "image_size": 32, "batch_size": 8, "bn_groups": 2, "epochs": 1,
        "moco_k": 16, "moco_dim": 8, "knn_every": 0, "save_steps": 1,
    },
    "rows": [{"moco_m": 0.5}],
    "seeds": 2,
    "knn": {"neighbours": 5},
    "linear": {"cache_features": True, "epochs": 1, "batch_size": 8, "lr": 0.1},
}  # fmt: skip
SHORT = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", "2"),
    *("TEST.PRECISE_BN.NUM_ITER", "1", "INPUT.CROP.SIZE", "[65,65]"),
]


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        record_ablation(checkout, root)
        record_reproduction(checkout, root)
        for name in ("ablation", "reproduce"):
            shutil.rmtree(HERE / name, ignore_errors=True)
            paths = {"data": root / "data", "output": root / name, "repository": checkout}
            keep(root / name, HERE / name, {**paths, "python": sys.executable})


def record_ablation(checkout: Path, root: Path) -> None:
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label, level in (("a", 80), ("b", 160)):
            folder = root / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = noise.normal(level, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"{i}.png"), image)
    (root / "ablation").mkdir()
    file = root / "ablation" / "tiny.yaml"
    file.write_text(yaml.safe_dump(ABLATION, sort_keys=False))
    command = [sys.executable, checkout / "tools/ablate.py", file, "-j", "0"]
    command += ["--data", root / "data", "--output", root / "ablation"]
    process = subprocess.Popen([str(word) for word in command], cwd=checkout)
    while not (root / "ablation/moco_m_0.5/seed1/trial.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


def record_reproduction(checkout: Path, root: Path) -> None:
    output = root / "reproduce"
    command = [sys.executable, "-m", "moco_det.benchmark.procedural_tasks"]
    command += ["--output", str(output / "data"), "--train-images", "2"]
    subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": "."}, check=True)
    (output / "draw.done").touch()
    weights = root / "moco.pkl"
    architecture = Architecture(50, 1, 16, 0.25)
    state = {name: value.numpy() for name, value in architecture.build().state_dict().items()}
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    content = {
        "model": rename(state, "torchvision", "detectron2"),
        "__author__": "test",
        "matching_heuristics": True,
        "requires": architecture.config(),
    }
    weights.write_bytes(pickle.dumps(content))
    command = [sys.executable, checkout / "tools/reproduce.py", "--quick", "--tables"]
    command += ["6-semantic", "--trials", 1, "--output", output, "--weights", f"moco={weights}"]
    subprocess.run([str(word) for word in [*command, "--opts", *SHORT]], cwd=checkout, check=True)
    shutil.rmtree(output / "runs/voc_R50_FCN16/moco")  # its weights are other ones each time


def keep(source: Path, target: Path, paths: dict[str, str | Path]) -> None:
    for path in sorted({path for name in KEPT for path in source.rglob(name)}):
        text = path.read_text()
        for name, value in paths.items():
            text = text.replace(str(value), f"{{{name}}}")
        if path.name == "run.json":
            record = json.loads(text)
            text = json.dumps(record | {"hardware": {"host": "recorded"}}, indent=2) + "\n"
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)


if __name__ == "__main__":
    main()
