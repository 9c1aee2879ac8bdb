"""Record what the evaluator of Detectron2's DensePose project makes of two cases.

    PYTHONPATH=DETECTRON2:DETECTRON2/projects/DensePose:tests \
        python tests/golden/record_densepose_ap.py

"drawn": persons and detections drawn at random, with crowds, persons whose dense pose was not
annotated, and every form of mask. "official": the example of the official results format, and
persons made of these results, points and masks, disturbed more from one person to the next. The
body is that of `densepose_template`.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from recording import write

from moco_det.densepose.points import decode_iuv, encode_iuv

STEPS = 5  # of the template's charts
MODES = {"densepose_gps": "GPS", "densepose_gpsm": "GPSM", "densepose_segm": "IOU"}
METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
CATEGORIES = [{"id": 1, "name": "person"}]
IMAGES, SIDE = 30, 240
POINTS = ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V")


def official_case(folder: Path) -> tuple[dict, list[dict]]:
    """A COCO file's content, and the official results that it was made of."""
    random = np.random.default_rng(1)
    results = json.loads((folder / "example_results.json").read_text())
    images = []
    for number in sorted({result["image_id"] for result in results}):
        name = f"{number:012}.jpg"
        with Image.open(folder / "images" / name) as image:
            size = {"width": image.width, "height": image.height}
        images.append({"id": number, "file_name": name, **size})
    persons = []
    for result in results:
        iuv = decode_iuv(result)
        if (iuv[0] > 0).any():
            shift = 0.02 * len(persons)  # of U and V, so that the similarities are 0.5 to 1
            person = _person_of(iuv, result["bbox"], shift, random)
            persons.append(person | {"image_id": result["image_id"], "id": len(persons) + 1})
    # One that was not annotated, and one that nothing found.
    persons[3] = {key: value for key, value in persons[3].items() if not key.startswith("dp_")}
    persons.append(persons[0] | {"id": len(persons) + 1, "bbox": [10, 200, 215, 200]})
    return {"images": images, "categories": CATEGORIES, "annotations": persons}, results


def _person_of(iuv: np.ndarray, box: list[float], shift: float, random) -> dict:
    """A person of whom `box` and `iuv` would be a detection, with up to 100 points."""
    x, y, width, height = (float(side) for side in box)
    own = [x + random.uniform(-2, 2), y + random.uniform(0, 2), width * 1.03, height * 1.02]
    rows, columns = np.nonzero(iuv[0])
    chosen = random.choice(len(rows), min(100, len(rows)), replace=False)
    rows, columns = rows[chosen], columns[chosen]
    parts, u, v = iuv[:, rows, columns]
    wrong = random.random(len(parts)) < shift / 2
    parts = np.where(wrong, parts % 24 + 1, parts)
    u = np.clip(u / 255 + random.normal(0, shift, len(parts)), 0, 1)
    v = np.clip(v / 255 + random.normal(0, shift, len(parts)), 0, 1)
    places = (columns + x + 0.5 - own[0]) / own[2], (rows + y + 0.5 - own[1]) / own[3]
    places = [np.clip(255 * place, 0, 255).tolist() for place in places]
    person = dict(zip(POINTS, (*places, parts.tolist(), u.tolist(), v.tolist()), strict=True))
    grid = np.linspace(0, 1, 256)
    rows = (grid * (iuv.shape[1] - 1)).astype(int)
    columns = (grid * (iuv.shape[2] - 1)).astype(int)
    person["dp_masks"] = _masks_of(iuv[0][np.ix_(rows, columns)])
    return person | {"bbox": own, "area": own[2] * own[3], "category_id": 1, "iscrowd": 0}


def _masks_of(parts: np.ndarray) -> list:
    """14 masks of an image of parts (256, 256), two parts to a mask; not the body's own 14."""
    masks = []
    for number in range(14):
        mask = (parts == 2 * number + 1) | (parts == 2 * number + 2)
        packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        packed["counts"] = packed["counts"].decode()
        masks.append(packed if mask.any() else [])
    return masks


def surface(across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Part, U and V at places of a box, 0 to 1: an ellipse, cut into 4 x 6 parts; (3, ...)."""
    column, row = (np.clip(4 * across, 0, 3.99), np.clip(6 * down, 0, 5.99))
    body = (across - 0.5) ** 2 + (down - 0.5) ** 2 < 0.25
    iuv = np.stack([4 * row.astype(int) + column.astype(int) + 1, column % 1, row % 1])
    return iuv * body


def drawn_case() -> tuple[dict, list[dict]]:
    """As `official_case`."""
    random = np.random.default_rng(0)
    persons, results = [], []
    for image in range(IMAGES):
        for _ in range(random.integers(0, 5)):
            x, y, w, h = _quarters([*random.uniform(0, 100, 2), *random.uniform(15, 130, 2)])
            person = {"image_id": image, "id": len(persons) + 1, "category_id": 1, "iscrowd": 0}
            person |= {"bbox": [x, y, w, h], "area": 0.7 * w * h}
            persons.append(person | _annotated(person["bbox"], random))
            for _ in range(random.integers(0, 3)):
                results.append({"image_id": image, **_detected(person["bbox"], random)})
        if random.random() < 0.4:
            box = _quarters([*random.uniform(0, 100, 2), *random.uniform(15, 130, 2)])
            results.append({"image_id": image, **_detected(box, random)})
    for result, score in zip(results, random.permutation(len(results)), strict=True):
        result |= {"score": (int(score) + 1) / 256, "category_id": 1}
    sizes = {"height": SIDE, "width": SIDE}
    images = [{"id": i, "file_name": f"{i}.jpg", **sizes} for i in range(IMAGES)]
    return {"images": images, "categories": CATEGORIES, "annotations": persons}, results


def _quarters(values) -> list[float]:
    return (np.round(np.asarray(values) * 4) / 4).tolist()


def _annotated(box: list[float], random) -> dict:
    """Dense pose and mask, or one of them, or none; or a crowd's."""
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    kind = random.integers(8)
    if kind == 0:
        runs = coco_mask.frPyObjects(corners, SIDE, SIDE)[0]
        return {"iscrowd": 1, "segmentation": {**runs, "counts": runs["counts"].decode()}}
    if kind == 1:
        return {"segmentation": corners} if random.random() < 0.5 else {}
    places = random.uniform(0, 1, (2, 40))
    found = surface(*places)
    places, found = places[:, found[0] > 0], found[:, found[0] > 0]
    points = dict(zip(POINTS, [*(255 * places).tolist(), *found.tolist()], strict=True))
    if kind == 2:
        return points | {"segmentation": corners}
    if kind == 3:
        return points
    grid = np.linspace(0, 1, 256)
    return points | {"dp_masks": _masks_of(surface(*np.meshgrid(grid, grid))[0])}


def _detected(box: list[float], random) -> dict:
    """The box, moved, and the surface seen in it, moved on the body."""
    noise = random.choice([0, 0.01, 0.03, 0.1])
    x, y, w, h = box
    shifts = random.normal(0, noise, 2) * [w, h]
    x, y, w, h = _quarters([x + shifts[0], y + shifts[1], *random.normal([w, h], noise * w)])
    w, h = max(w, 0.75), max(h, 0.75)
    rows, columns = max(int(h), 1), max(int(w), 1)
    across = (np.arange(columns) + 0.5 + x - box[0]) / box[2] + random.normal(0, noise / 2)
    down = (np.arange(rows) + 0.5 + y - box[1]) / box[3] + random.normal(0, noise / 2)
    iuv = surface(*np.meshgrid(across, down))
    iuv[1:] *= 255
    return {"bbox": [x, y, w, h], **encode_iuv(iuv.astype(np.uint8))}


@contextlib.contextmanager
def template_instead_of_downloads(module) -> Iterator[None]:
    """The DensePose project asks for its files by their URLs."""
    from densepose_template import write_template

    with tempfile.TemporaryDirectory() as folder:
        write_template(folder, STEPS)
        manager = mock.Mock()
        manager.get_local_path = lambda url, **_: f"{folder}/{Path(url).name}"
        with mock.patch.object(module, "PathManager", manager):
            yield


def reference(content: dict, results: list[dict]) -> dict[str, dict]:
    """Its numbers.

    Returns:
        {"gps": {image id: GPS of the 20 best detections, the best first, and all persons},
        "densepose_gps", ...: {metric: percent, -100 without ground truth}}.
    """
    import torch
    from densepose.evaluation import densepose_coco_evaluation as evaluation
    from densepose.structures.chart_result import DensePoseChartResultQuantized
    from pycocotools.coco import COCO

    found = {}
    with template_instead_of_downloads(evaluation):
        for task, mode in MODES.items():
            truth = COCO()
            truth.dataset = json.loads(json.dumps(content))  # the evaluator changes both
            truth.createIndex()
            detections = [
                {key: result[key] for key in ("image_id", "category_id", "bbox", "score")}
                | {"densepose": DensePoseChartResultQuantized(torch.tensor(decode_iuv(result)))}
                for result in results
            ]
            mode = evaluation.DensePoseEvalMode[mode]
            run = evaluation.DensePoseCocoEval(truth, truth.loadRes(detections), dpEvalMode=mode)
            run.evaluate()
            run.accumulate()
            run.summarize()
            found[task] = dict(zip(METRICS, (100 * run.stats).tolist(), strict=True))
    return {
        "gps": {str(key[0]): pair[0].tolist() for key, pair in run.ious.items() if pair}
    } | found


def record() -> dict[str, dict]:
    from conftest import SHARED_DATA

    return {
        "drawn": reference(*drawn_case()),
        "official": reference(*official_case(SHARED_DATA / "densepose")),
    }


if __name__ == "__main__":
    write("densepose_ap", record())
