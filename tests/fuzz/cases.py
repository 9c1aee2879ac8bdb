"""The folders that a maker of cases has written, through the commands that each concerns.

A case is known by its folder's name. For each command: what happened, and whether that is what the
case asks for.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tabulate import tabulate
from tiny_voc import write_tiny_config, write_tiny_voc

from tests.fuzz.detection import MASKS, read_and_score
from tests.fuzz.sandbox import Outcome, Step, run_all, run_call, run_command
from tests.fuzz.subjects import MOCO, NATIVE, PRETRAIN, SHORT, TRAIN, command, write_images

Run = Callable[[Path, Path], Step]  # (corpus, empty folder) -> step
Check = Callable[[Step], str]  # "" where it is as it must be


# -- what a case asks for -------------------------------------------------------------------------


def accepted(step: Step) -> str:
    return "" if step.accepted else "must be accepted"


def refused(step: Step, *words: str) -> str:
    said = f"{step.message} {step.out}"
    lacks = [word for word in words if word not in said]
    if step.accepted:
        return "must be refused"
    return f"does not name {lacks[0]}" if lacks else ""


def early(step: Step) -> str:
    """Trained, or refused before the first iteration, naming an annotation."""
    if re.search(r"^(eta|iter): |evaluating on", step.out, re.MULTILINE) and not step.accepted:
        return "fails after training"
    return "" if step.accepted else refused(step, "annotation")


def perfect(step: Step) -> str:
    return accepted(step) or ("" if "AP 100.00" in step.out else f"{step.out.strip()}, not 100")


def unreadable(step: Step) -> str:
    named = set(re.findall(r"unreadable image.*/(\w)_", step.out))
    return accepted(step) or ("" if named == {"f", "g"} else f"unreadable: {sorted(named)}")


def quick(step: Step, *words: str) -> str:
    return refused(step, *words) or ("" if step.seconds < 1 else f"takes {step.seconds:.1f} s")


# -- the commands ---------------------------------------------------------------------------------


def detector(name: str, *options: object) -> dict[str, Run]:
    """The commands that read a data set."""
    names = f"('{name}',)"
    chosen = [*options, "DATASETS.TRAIN", names, "DATASETS.TEST", names]

    def check_data(corpus: Path, folder: Path) -> Step:
        config = corpus / "detector.yaml"
        return run_command(folder, "tools/check_data.py", "--config-file", config, *chosen)

    def train(corpus: Path, folder: Path) -> Step:
        config, last = corpus / "detector.yaml", ["SOLVER.MAX_ITER", 1, "OUTPUT_DIR", folder]
        arguments = ["--config-file", config, *SHORT, *chosen, *last]
        return run_command(folder, TRAIN, *NATIVE, *arguments)

    def visualize(corpus: Path, folder: Path) -> Step:
        arguments = ["--dataset", name, "--output", folder / "drawn"]
        return run_command(folder, "tools/visualize.py", *arguments)

    def score(corpus: Path, folder: Path) -> Step:
        return run_call(folder, "score", lambda: read_and_score(name))

    return {f.__name__: f for f in (check_data, train, visualize, score)}


def convert(path: Path, *options: str) -> Run:
    def run(corpus: Path, folder: Path) -> Step:
        out = folder / ("out.pth" if options else "out.pkl")
        return run_command(folder, "tools/convert_to_d2.py", path, out, *options)

    return run


def pretrain(*arguments: object) -> Run:
    def run(corpus: Path, folder: Path) -> Step:
        return run_command(folder, PRETRAIN, *arguments, "--output", folder / "run")

    return run


def distinct(path: Path) -> Run:
    """One pass over a shard: prints how many different images came."""

    def run(corpus: Path, folder: Path) -> Step:
        from pretrain.data.augmentations import MoCoAugmentation
        from pretrain.engine.pretraining import MoCoPretraining

        seen, train_step = set(), MoCoPretraining.step

        def step(self, batch, number):
            seen.update(view.numpy().tobytes() for view in batch.views[0])
            return train_step(self, batch, number)

        MoCoPretraining.step = step
        MoCoAugmentation.view = lambda self, image, drawn, reduction: image
        found = pretrain(path, *MOCO, "--epochs", 1, "--samples-per-epoch", 32)(corpus, folder)
        found.out += f"\n{len(seen)} distinct images\n"
        return found

    return run


def whole_pass(step: Step) -> str:
    if not step.accepted:
        return refused(step, "dots.tar")
    return "" if "\n32 distinct" in step.out else step.out.strip().splitlines()[-1]


def plan(cases: Path) -> Iterator[tuple[str, str, Run, Check]]:
    """(case, command, how to run it, what must come of it) for every folder that is known."""
    for folder in sorted(path for path in cases.iterdir() if path.is_dir()):
        for name, run, check in checks(folder):
            yield folder.name, name, run, check


def checks(folder: Path) -> Iterator[tuple[str, Run, Check]]:
    case = folder.name
    if case.startswith("coco_"):
        mask_format = "bitmask" if case == "coco_infinite_polygon" else "polygon"
        options = [*MASKS, "INPUT.MASK_FORMAT", mask_format]
        runs = detector(f"coco:{folder}/annotations.json:{folder}", *options)
        asked = {
            "coco_ids_from_zero": {"train": accepted, "score": perfect},
            "coco_without_annotation_ids": {"check_data": early, "train": early},
            "coco_area_null": {"check_data": early, "train": early},
            "coco_short_polygon": {"check_data": early, "train": early},
            "coco_minimal": {"train": accepted, "check_data": accepted, "score": perfect},
            "coco_exif_without_size": {"train": accepted, "check_data": accepted},
            "coco_infinite_polygon": dict.fromkeys(("train", "check_data"), annotation_1),
            "coco_nan_box": dict.fromkeys(("train", "check_data"), annotation_1),
            "coco_giant_size": {"train": image_0, "visualize": says_image_0},
            "coco_null_category": dict.fromkeys(("train", "check_data"), refused)
            | {"visualize": any_line},
            "coco_byte_order_mark": dict.fromkeys(runs, accepted),
        }
        for name, check in asked.get(case, dict.fromkeys(runs, any_line)).items():
            yield name, runs[name], check
    elif case.startswith("voc_"):
        runs = detector(f"voc:{folder}:train", "MODEL.ROI_HEADS.NUM_CLASSES", 1)
        for name in ("check_data", "train", "visualize"):
            yield name, runs[name], accepted
    elif case.startswith("weights_"):
        for path in sorted(folder.iterdir()):
            back = ("--to", "torchvision") if path.suffix == ".pkl" else ()
            yield f"convert {path.name}", convert(path, *back), partial(names_file, path.name)
    elif case == "yaml":
        for path in sorted(folder.iterdir()):
            words = ["lr"] if path.name in ("nan.yaml", "date.yaml", "recursive.yaml") else []
            yield f"--recipe {path.name}", recipe(path), lambda step, w=words: quick(step, *w)
            yield f"--config-file {path.name}", config_file(path), quick
    elif case == "images":
        flags = [*MOCO, "-b", 6, "--epochs", 1, "--max-unreadable", 0.5]
        yield "pretrain", pretrain(folder, *flags), unreadable
        for drawing in (False, True):
            run = sixteen_bit(folder / "a_16bit_ramp.png", drawing)
            yield f"16 bit, {'drawn' if drawing else 'pretrained on'}", run, accepted
        yield "train a-e", detect(folder, "abcde"), accepted
        yield "train f", detect(folder, "abf"), partial(names_file, "f_truncated.jpg")
        yield "train g", detect(folder, "abg"), partial(names_file, "g_float.tiff")
    elif case.startswith("shard"):
        yield "pretrain", distinct(folder / "dots.tar"), whole_pass


def annotation_1(step: Step) -> str:
    return refused(step, "annotation 1")


def image_0(step: Step) -> str:
    return refused(step, "image 0")


def says_image_0(step: Step) -> str:
    return "" if "image 0" in step.out + step.err else "does not name image 0"


def any_line(step: Step) -> str:
    return ""


def names_file(name: str, step: Step) -> str:
    """Refused by the reader, not because what it has read is no whole network."""
    if "ResNet" in step.message:
        return "was read"
    return refused(step, name)


def config_file(path: Path) -> Run:
    def run(corpus: Path, folder: Path) -> Step:
        return run_command(folder, TRAIN, *NATIVE, "--config-file", path, "OUTPUT_DIR", folder)

    return run


def recipe(path: Path) -> Run:
    def run(corpus: Path, folder: Path) -> Step:
        arguments = [corpus / "images", *MOCO, "--recipe", path, "--iterations", 1]
        return pretrain(*arguments)(corpus, folder)

    return run


def detect(images: Path, chosen: str) -> Run:
    """Train on those of the case's images whose names begin with one of the letters."""

    def run(corpus: Path, folder: Path) -> Step:
        paths = [path for path in sorted(images.iterdir()) if path.name[0] in chosen]
        boxes = [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [5, 8, 30, 40], "area": 1200}
            for i in range(1, len(paths) + 1)
        ]
        content = {
            "images": [{"id": i, "file_name": path.name} for i, path in enumerate(paths, start=1)],
            "annotations": [box | {"iscrowd": 0} for box in boxes],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        }
        (folder / "a.json").write_text(json.dumps(content))
        return detector(f"coco:{folder / 'a.json'}:{images}")["train"](corpus, folder)

    return run


def sixteen_bit(path: Path, drawing: bool) -> Run:
    """Fails where a ramp of 16 bits does not have the mean of one of 8."""

    def call() -> None:
        from moco_det import visualize
        from pretrain.data import images

        record = {"file_name": str(path), "image_id": 1, "height": 96, "width": 128}
        image = visualize.read_image(record) if drawing else images.read_image(str(path))
        mean = float(image.float().mean() if drawing else image.mean())
        print(f"mean {mean:.0f}")
        if not 120 < mean < 135:
            raise SystemExit(f"error: {path.name} has the mean {mean:.0f}, not about 127")

    return lambda corpus, folder: run_call(folder, "read", call)


# -- all of them ----------------------------------------------------------------------------------


def run_cases(cases: Path, root: Path, jobs: int) -> int:
    """Print the table; 1 where something is not as it must be."""
    corpus = root / "corpus"

    def prepare(folder: Path) -> tuple[str, str]:
        corpus.mkdir()
        write_images(corpus / "images")
        write_tiny_config(corpus / "detector.yaml", write_tiny_voc(corpus / "voc", images=3))
        command(corpus, "tools/check_data.py", "--config-file", corpus / "detector.yaml")
        return "", ""

    def work(run: Run, check: Check, folder: Path) -> tuple[str, str]:
        step = run(corpus, folder)
        return "", check(step)

    list(run_all(iter([("corpus", prepare)]), root, 1))
    todo = (((case, name), partial(work, run, check)) for case, name, run, check in plan(cases))
    rows, failed = [], 0
    for (case, name), outcome in sorted(run_all(todo, root, jobs), key=lambda item: item[0]):
        failed += outcome.failed
        rows.append([case, name, "NO" if outcome.failed else "yes", told(outcome)])
    print(tabulate(rows, ["case", "command", "as it must", "what happened"], "github"))
    print(f"\n{failed} of {len(rows)} are not as they must be")
    return int(failed > 0)


def told(outcome: Outcome) -> str:
    step = outcome.steps[-1] if outcome.steps else None
    line = ""
    if step:
        lines = [x for x in step.out.splitlines() if x.strip() and x[0] != "|"] or [""]
        line = (step.message or (lines[1:] or lines)[0 if step.code else -1]).split("\n")[0]
    where = f" at {outcome.place}" if outcome.place else ""
    kind = f"{outcome.kind}{where}: {outcome.detail}" if outcome.failed else outcome.kind
    return f"{kind} [{line[:170]}] {outcome.rss >> 20} MB".replace("|", "/")
