"""Annotations in JSON: COCO's, with keypoints, LVIS' and dense pose."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

from tiny_densepose import write_tiny_densepose
from tiny_voc import write_tiny_config

from tests.fuzz import mutations
from tests.fuzz.detection import KEYPOINTS, MASKS, drive, picture
from tests.fuzz.mutations import described, mutate_bytes, mutate_tree
from tests.fuzz.subjects import note, odd_file


def coco(folder: Path) -> dict[str, Any]:
    """Three images with two objects each, which have polygons and three keypoints."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(3):
        picture(i).save(folder / f"{i}.jpg", quality=92)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64})
        for j, (x, y, w, h) in enumerate(((4, 4, 16, 20), (30, 10, 20, 30))):
            annotations.append(
                {
                    "id": 2 * i + j + 1,
                    "image_id": i,
                    "category_id": j + 1,
                    "iscrowd": 0,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "num_keypoints": 3,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": [x + 1, y + 1, 2, x + w - 1, y + 1, 2, x + 1, y + h - 1, 1],
                }  # fmt: skip
            )
    names = {"keypoints": ["a", "b", "c"], "skeleton": [[1, 2], [2, 3]]}
    categories = [{"id": i, "name": name} | names for i, name in ((1, "red"), (2, "green"))]
    return {"images": images, "annotations": annotations, "categories": categories}


def lvis(content: dict[str, Any]) -> dict[str, Any]:
    names = [{"id": i, "name": f"thing {i}", "frequency": "rcf"[i % 3]} for i in range(1, 1231)]
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['file_name']}"
        image |= {"neg_category_ids": [4], "not_exhaustive_category_ids": [9]}
    for annotation in content["annotations"]:
        annotation.pop("keypoints", None)  # which no category of LVIS names
    return content | {"categories": names}


def prepare_json(corpus: Path) -> None:
    content = coco(corpus / "coco")
    (corpus / "coco.json").write_text(json.dumps(content))
    (corpus / "lvis.json").write_text(json.dumps(lvis(content)))
    write_tiny_densepose(corpus / "densepose")
    shutil.move(corpus / "densepose/annotations.json", corpus / "densepose.json")
    write_tiny_config(corpus / "detector.yaml", corpus)


def renumbered(rng: random.Random, content: dict[str, Any]) -> str:
    """Give the annotations other ids, as exports do; what was done."""
    annotations, kind = content["annotations"], rng.randrange(6)
    for i, annotation in enumerate(annotations):
        same = [a for a in annotations[:i] if a["image_id"] == annotation["image_id"]]
        numbers = (i, len(same) + 1, 7, f"{i}", -i, i + 2**53)
        annotation["id"] = numbers[kind]
    return ("ids from 0", "ids from 1 in each image", "one id", "ids as text", "negative ids",
            "huge ids")[kind]  # fmt: skip


def hostile_shape(rng: random.Random, content: dict[str, Any]) -> tuple[str, str]:
    """Change a mask, a size, a box or a kind of entry as no single value can; (what, must)."""
    annotation, image = rng.choice(content["annotations"]), rng.choice(content["images"])
    side = rng.choice((10**4, 10**5, 10**9, 2**31, 2**63))
    infinite = rng.choice(mutations.NOT_FINITE)
    changes: dict[str, tuple[dict, dict, str]] = {
        "giant image": (image, {"height": side, "width": side}, "refuse"),
        "giant RLE": (annotation, {"segmentation": {"size": [side, side], "counts": [side]}},
                      "refuse"),
        "giant compressed RLE": (annotation, {"segmentation": {"size": [side, side],
                                                               "counts": "aa1"}}, "refuse"),
        "RLE of another size": (annotation, {"segmentation": {"size": [9, 9], "counts": [0, 81]}},
                                "refuse"),
        "RLE of too many": (annotation, {"segmentation": {"size": [48, 64],
                                                          "counts": [0, 10**6]}}, "refuse"),
        "negative RLE": (annotation, {"segmentation": {"size": [48, 64],
                                                       "counts": [-5, 3077]}}, "refuse"),
        "no RLE": (annotation, {"segmentation": {"size": [48, 64], "counts": "\x7f\x00~~"}},
                   "refuse"),
        "polygon to infinity": (annotation, {"segmentation": [[1, 2, infinite, 4, 5, 6]]},
                                "refuse"),
        "far polygon": (annotation, {"segmentation": [[1, 2, 1e9, 4, 5, 1e9]]}, "refuse"),
        "polygon of two points": (annotation, {"segmentation": [[1, 2, 3, 4]]}, "any"),
        "empty polygon": (annotation, {"segmentation": [[]]}, "any"),
        "a million points": (annotation, {"segmentation": [[1.5, 2.5] * 500_000]}, "any"),
        "crowd without a mask": (annotation, {"iscrowd": 1, "segmentation": []}, "any"),
        "only crowds": (annotation, {"iscrowd": 1}, "any"),
        "box to infinity": (annotation, {"bbox": [1, 2, infinite, 4]}, "refuse"),
        "far box": (annotation, {"bbox": [1, 2, 1e30, 4]}, "any"),
        "box outside": (annotation, {"bbox": [1e3, 1e3, 5, 5]}, "any"),
        "file name to /dev/zero": (image, {"file_name": "/dev/zero"}, "refuse"),
        "a folder for an image": (image, {"file_name": "."}, "refuse"),
        "NUL in a file name": (image, {"file_name": "a\0b"}, "refuse"),
        "a long file name": (image, {"file_name": "a" * 5000}, "refuse"),
        "a category of null": (content, {"categories": [None, *content["categories"]]}, "any"),
        "a category twice": (content, {"categories": content["categories"] * 2}, "any"),
        "an image twice": (content, {"images": content["images"] * 2}, "any"),
        "no annotations": (content, {"annotations": []}, "any"),
        "annotations of null": (content, {"annotations": None}, "refuse"),
        "deep": (annotation, {"segmentation": mutations.nested(900)}, "any"),
        "area as text": (annotation, {"area": "120"}, "any"),
        "no area": (annotation, {"area": None}, "any"),
        "height as a float": (image, {"height": 48.0}, "any"),
    }  # fmt: skip
    what = rng.choice(sorted(changes))
    target, change, must = changes[what]
    target |= change
    if what == "only crowds":
        for other in content["annotations"]:
            other |= change
    return what, must


def attempt_json(rng: random.Random, corpus: Path, folder: Path) -> str:
    kind = rng.choices(("coco", "keypoints", "lvis", "densepose"), (6, 3, 1, 2))[0]
    stem = "coco" if kind == "keypoints" else kind
    content = json.loads((corpus / f"{stem}.json").read_text())
    change = rng.choices(("value", "shape", "ids", "bytes", "text", "odd", "none"),
                         (10, 5, 2, 3, 1, 0.4, 0.4))[0]  # fmt: skip
    file, must, text = folder / "a.json", "any", None
    if change == "value":
        content, path, value = mutate_tree(rng, content)
        used = path[0] != "categories" and "dp" not in str(path) and "num_keypoints" not in path
        bad = isinstance(value, float) and not math.isfinite(value)
        keypoints = "keypoints" in path and kind != "keypoints"
        must = "refuse" if bad and used and not keypoints and kind != "lvis" else "any"
        what = described(path, value)
    elif change == "shape":
        what, must = hostile_shape(rng, content)
        must = "any" if "segmentation" in what or kind in ("lvis", "densepose") else must
    elif change == "ids":
        what = renumbered(rng, content)
    elif change == "none":
        what, must = "unchanged", "accept"
    elif change == "odd":
        what, must = "", "refuse"
    elif change == "bytes":
        data, what = mutate_bytes(rng, json.dumps(content).encode())
        file.write_bytes(data)
    else:
        what, text = rng.choice((("deep", "[" * 100_000), ("deep maps", '{"a":' * 100_000),
                                 ("digits", "9" * 100_000), ("null", "null"), ("text", '"x"'),
                                 ("a surrogate", '{"images": "\\ud800"}'), ("a list", "[]"),
                                 ("twice", json.dumps(content) * 2)))  # fmt: skip
        must = "refuse"
    if change == "odd":
        what = odd_file(rng, file)
    elif not file.exists():
        encoding = rng.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16"))
        must = "any" if encoding == "utf-16" else must
        what += f", in {encoding}" if encoding != "utf-8" else ""
        file.write_bytes((text or json.dumps(content)).encode(encoding, "surrogatepass"))
    note(folder, f"{kind}: {what}")
    options: list[object] = []
    if kind in ("coco", "keypoints"):
        options = [*MASKS, "INPUT.MASK_FORMAT", rng.choice(("polygon", "bitmask"))]
        options = KEYPOINTS if kind == "keypoints" else options
    elif kind == "densepose":
        options = ["MODEL.ROI_HEADS.NUM_CLASSES", 1]
    else:
        options = ["MODEL.ROI_HEADS.NUM_CLASSES", 1230]
    name = f"{'coco' if kind == 'keypoints' else kind}:{file}:{corpus / stem}"
    if kind == "lvis":
        name = f"lvis:{file}:{corpus / 'coco'}"
    return drive(rng, folder, corpus / "detector.yaml", name, options, must)
