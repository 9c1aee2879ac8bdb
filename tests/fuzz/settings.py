"""Configs, recipes and grids; the files of runs."""

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from pycocotools import mask as coco_mask
from tiny_semantic import write_tiny_semantic
from tiny_voc import write_tiny_config, write_tiny_voc

from tests.fuzz.annotations import coco
from tests.fuzz.mutations import described, mutate_bytes, mutate_tree
from tests.fuzz.sandbox import Step, canary, run_command
from tests.fuzz.subjects import (
    MOCO,
    NATIVE,
    PRETRAIN,
    SHORT,
    TRAIN,
    command,
    complaint,
    note,
    odd_file,
    write_images,
)  # fmt: skip

# -- configs and recipes --------------------------------------------------------------------------

RECIPE = {
    "arch": "resnet50w0.25x", "image_size": 32, "batch_size": 4, "epochs": 2, "lr": 0.03,
    "weight_decay": 1e-4, "momentum": 0.9, "schedule": [1], "moco_k": 8, "moco_dim": 8,
    "moco_m": 0.99, "moco_t": 0.1, "mlp": True, "cos": False, "aug_plus": True, "workers": 0,
    "bn_groups": 2, "knn_every": 0, "print_freq": 1, "keep": 1, "seed": 1, "max_unreadable": 0.1,
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
        if use == "train":  # without its INPUT, images would be of Detectron2's size
            options += ["INPUT.MAX_SIZE_TRAIN", "96", "INPUT.MAX_SIZE_TEST", "96"]
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

EXPERIMENTS = ("coco_R50_FPN_mask", "voc_R50_FCN16")
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
    write_predictions(corpus)
    images = write_images(corpus / "images")
    command(corpus, PRETRAIN, images, *MOCO, "--iterations", 4, "--output", corpus / "moco")
    for path in (corpus / "moco").glob("*.pth.tar"):
        path.unlink()


def square(height: int, width: int) -> dict:
    """A mask of a square as an RLE that JSON can hold."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[4:24, 4:20] = 1
    code = coco_mask.encode(mask)["counts"].decode()
    return {"size": [height, width], "counts": code}


def write_predictions(corpus: Path) -> None:
    """Of shapes on a COCO data set, and of label maps: corpus/shapes.json and labels.json."""
    (corpus / "coco.json").write_text(json.dumps(coco(corpus / "coco")))
    write_tiny_semantic(corpus / "semantic", images=4)
    shapes, labels = [], []
    for i in range(2):
        found = {"boxes": [[4.0, 4.0, 20.0, 24.0]], "scores": [0.9], "classes": [i]}
        found |= {"segmentations": [square(48, 64)], "keypoints": [[[5.0, 5.0, 1.0]] * 3]}
        shapes.append({"image_id": i} | found)
        segment = {"category_id": 3 + i, "segmentation": square(96, 128)}
        labels.append({"image_id": f"{i:03d}", "sem_seg": [segment]})
    (corpus / "shapes.json").write_text(json.dumps(shapes))
    (corpus / "labels.json").write_text(json.dumps(labels))


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
    if use == "visualize" and rng.random() < 0.7:
        kind = rng.choice(("shapes.json", "labels.json"))
        file = Path(shutil.copy(corpus / kind, folder / kind))
    what = change_record(rng, file)
    note(folder, f"{use}: {file.name} {what}")
    whole = what == "unchanged"
    if use == "doctor":
        run_command(folder, "pretrain/doctor.py", folder / "moco")
        return ""  # it may have something to say of the whole run, too
    if use == "visualize":
        name = {
            "shapes.json": f"coco:{corpus}/coco.json:{corpus}/coco",
            "labels.json": f"voc_sem_seg:{corpus}/semantic:train",
        }.get(file.name, f"voc:{corpus / 'voc'}:test")
        step = run_command(folder, "tools/visualize.py", "--dataset", name,
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
        last = data.splitlines()[-1]
        data += last[: len(last) // 2]
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
