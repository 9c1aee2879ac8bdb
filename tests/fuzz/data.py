"""The classes of inputs that are data sets: annotations, lists, images and label maps."""

import io
import json
import math
import random
import re
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tiny_densepose import write_tiny_densepose
from tiny_semantic import write_tiny_segmentor, write_tiny_semantic
from tiny_voc import write_tiny_config, write_tiny_voc

from tests.fuzz import mutations
from tests.fuzz.mutations import described, mutate_bytes, mutate_tree
from tests.fuzz.sandbox import Step, canary, run_call, run_command
from tests.fuzz.subjects import MOCO, NATIVE, PRETRAIN, SHORT, TRAIN, complaint, note, odd_file

MASKS = [
    "MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7",
]  # fmt: skip
KEYPOINTS = [
    "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]",
]  # fmt: skip


# -- commands, and what they must agree on --------------------------------------------------------


def drive(
    rng: random.Random,
    folder: Path,
    config: Path,
    name: str,
    options: Sequence[object],
    must: str,
    training: float = 0.12,
) -> str:
    """The commands that read a data set; what is wrong with what they say of it.

    Args:
        name: of the data set, as a config writes it.
        must: "refuse", "accept" or "any"; see `subjects.complaint`.
        training: how often a detector is trained too.
    """
    names = f"('{name}',)"
    options = [*options, "DATASETS.TRAIN", names, "DATASETS.TEST", names]
    order = rng.sample(("check_data", "visualize", "read"), 3)
    steps = {}
    for command in order:
        if command == "check_data":
            arguments = ("--config-file", config, *options)
            steps[command] = run_command(folder, "tools/check_data.py", *arguments)
        elif command == "visualize":
            steps[command] = run_command(folder, "tools/visualize.py", "--dataset", name,
                                         "--limit", 2, "--output", folder / "drawn")  # fmt: skip
        else:
            steps[command] = run_call(folder, command, lambda: read_and_score(name))
    if rng.random() < training or must == "accept":
        options = [*SHORT, *options, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", folder / "run"]
        steps["train"] = run_command(folder, TRAIN, *NATIVE, "--config-file", config, *options)
    return disagreement(steps, must)


def read_and_score(name: str) -> None:
    """The records of a data set, then its own boxes as predictions: prints their AP."""
    from moco_det.common.errors import exit_cleanly
    from moco_det.datasets import get_dataset
    from moco_det.evaluation import evaluate

    with exit_cleanly():
        dataset = get_dataset(name)
        records = dataset.records()
        if dataset.evaluator == "sem_seg":
            return
        predictions = []
        for record in records:
            objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
            if len({str((a["category_id"], a["bbox"])) for a in objects}) < len(objects):
                return  # of two equal objects, metrics may take one
            found = {
                "image_id": record["image_id"],
                "boxes": [a["bbox"] for a in objects],
                "scores": [0.9] * len(objects),
                "classes": [a["category_id"] for a in objects],
            }
            if dataset.evaluator == "cityscapes":
                found["segmentations"] = [a["segmentation"] for a in objects]
            predictions.append(found)
        results = evaluate(dataset, predictions)
        task = "segm" if dataset.evaluator == "cityscapes" else "bbox"
        print(f"AP {results[task]['AP']:.2f}")


def disagreement(steps: dict[str, Step], must: str) -> str:
    doctor, read, train = (steps.get(name) for name in ("check_data", "read", "train"))
    if must in ("refuse", "accept"):
        for step in (doctor, train, *([read] if must == "accept" else [])):
            found = complaint(step, must) if step else ""
            if found:
                return found
    if doctor.accepted:
        for step in (read, train):
            if step and not step.accepted:
                return f"check_data passed what {step.name} refused: {step.message or step.out}"
        ap = re.search(r"AP (\S+)", read.out)
        if ap and float(ap[1]) < 99.99:
            return f"the file's own boxes score AP {ap[1]}"
    return ""


# -- JSON -----------------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 160, (6, 8, 3), dtype=np.uint8))
    pixels = np.array(small.resize((64, 48), Image.Resampling.BICUBIC))
    pixels[4:24, 4:20], pixels[10:40, 30:50] = (240, 60, 60), (60, 240, 60)
    return Image.fromarray(pixels)


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


# -- XML and lists --------------------------------------------------------------------------------


def prepare_voc(corpus: Path) -> None:
    write_tiny_config(corpus / "detector.yaml", write_tiny_voc(corpus / "voc", images=6))
    write_tiny_semantic(corpus / "semantic", images=4)
    write_tiny_segmentor(corpus / "segmentor.yaml", corpus / "semantic")


def attempt_xml(rng: random.Random, corpus: Path, folder: Path) -> str:
    root = folder / "voc"
    shutil.copytree(corpus / "voc", root)
    file = rng.choice(sorted((root / "Annotations").iterdir())[:4])
    kind = rng.choices(("value", "bytes", "document", "odd", "none"), (8, 4, 4, 0.4, 0.4))[0]
    text, must = file.read_text(), "any"
    if kind == "value":
        what = change_element(rng, file)
    elif kind == "bytes":
        data, what = mutate_bytes(rng, text.encode())
        file.write_bytes(data)
    elif kind == "odd":
        what, must = odd_file(rng, file), "refuse"
    elif kind == "none":
        what, must = "unchanged", "accept"
    else:
        what = xml_document(rng, file, text, folder)
    note(folder, f"{file.name}: {what}")
    return drive(rng, folder, corpus / "detector.yaml", f"voc:{root}:train", [], must)


def change_element(rng: random.Random, file: Path) -> str:
    tree = ElementTree.parse(file)
    parents = [(p, c) for p in tree.iter() for c in p]
    parent, child = rng.choice(parents)
    what = rng.choice(("missing", "duplicate", "text", "text", "text"))
    if what == "missing":
        parent.remove(child)
    elif what == "duplicate":
        parent.append(child)
    else:
        values = ("", "nan", "inf", "-5", "0", "1e400", "1e9", "12.7", "9" * 5000, "x", "true",
                  "Unspecified", "\u7ea2", " 7 ", "0x10", str(2**63), "\n", "1_0")  # fmt: skip
        child.text = what = rng.choice(values)
    tree.write(file, encoding="utf-8")
    return f"{parent.tag}.{child.tag} = {what[:30]!r}"


def xml_document(rng: random.Random, file: Path, text: str, folder: Path) -> str:
    """Replace the file by a hostile or an odd document; what it is."""
    bomb = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE x [<!ENTITY a0 "aaaaaaaaaa">{bomb}]>'
    outside = f'<!DOCTYPE x [<!ENTITY a SYSTEM "file://{canary(folder)}">]>'
    declared = '<?xml version="1.0" encoding="{}"?>'
    documents = {
        "bomb of entities": (bomb + text.replace("<name>", "<name>&a9;")).encode(),
        "quadratic bomb": (f'<!DOCTYPE x [<!ENTITY a "{"a" * 10**5}">]>'
                           + text.replace("<name>", "<name>" + "&a;" * 10**4)).encode(),
        "outer entity": (outside + text.replace("<name>", "<name>&a;")).encode(),
        "deep": b"<a>" * 50_000 + b"</a>" * 50_000,
        "many objects": text.replace(
            "</annotation>", text[text.index("<object>"):].replace("</annotation>", "") * 3000
            + "</annotation>").encode(),
        "no objects": b"<annotation><size><width>64</width><height>48</height></size></annotation>",
        "nothing": b"",
        "another root": text.replace("annotation", "other").encode(),
        "GB2312": declared.format("gb2312").encode()
        + text.replace("bar", "\u7ea2").replace("square", "\u7ea2").encode("gb2312"),
        "another encoding than declared": declared.format("utf-8").encode()
        + text.replace("bar", "b\u00e4r").encode("latin1"),
        "unknown encoding": declared.format("x-none").encode() + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "namespaces": text.replace("<annotation>", '<annotation xmlns="urn:x">').encode(),
        "comments": text.replace("<xmin>", "<xmin><!-- x -->").encode(),
        "corners exchanged": text.replace("xmin", "_").replace("xmax", "xmin")
        .replace("_", "xmax").encode(),
    }  # fmt: skip
    what = rng.choice(sorted(documents))
    file.write_bytes(documents[what])
    if rng.random() < 0.1:
        shutil.copy(file, file.with_name(f"._{file.name}"))
        what += ", and macOS's twin"
    return what


LINES = (
    "", " ", "000.jpg", "JPEGImages/000", "../JPEGImages/000", "./000", "IMG_jpg.rf.fe2a", "000 1",
    "000\t-1", "a\0b", "x" * 5000, "\ufeff000", "000\r", "no such", "/etc/passwd", "*", "~", "001",
    "000", "\u7ea2", "\u2028", "000\x0b001", "-1", ".", "..",
)  # fmt: skip


def attempt_list(rng: random.Random, corpus: Path, folder: Path) -> str:
    if rng.random() < 0.15:
        return attempt_pattern(rng, corpus, folder)
    kind = rng.choice(("voc", "semantic"))
    root = folder / kind
    shutil.copytree(corpus / kind, root)
    file = root / "ImageSets" / ("Main" if kind == "voc" else "Segmentation") / "train.txt"
    lines, must = file.read_text().splitlines(), "any"
    change = rng.choices(("line", "bytes", "long", "absent", "odd", "rename", "none"),
                         (8, 3, 0.5, 0.5, 0.5, 2, 0.5))[0]  # fmt: skip
    what = change
    if change == "line":
        line, place = rng.choice(LINES), rng.randrange(len(lines) + 1)
        lines[place : place + rng.randrange(2)] = [line]
        what = f"line {place} = {line[:30]!r}"
        file.write_bytes("\n".join(lines).encode())
    elif change == "bytes":
        data, what = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(data)
    elif change == "long":
        file.write_text("\n".join(f"absent{i}" for i in range(200_000)))
    elif change == "absent":
        file.unlink()
    elif change == "odd":
        what = odd_file(rng, file)
    elif change == "rename":  # an image whose name is odd, listed as it is called
        new = rng.choice(
            ("IMG_1_jpg.rf.fe2a", "a b", "\u7ea2", "a.b.c", "-x", "#1", "a'b", "x" * 200)
        )
        for path in sorted(root.rglob(f"{lines[0]}.*")):
            path.rename(path.with_name(new + path.suffix))
        what, lines[0] = f"an image called {new[:20]}", new
        must = "accept" if " " not in new else "any"
        file.write_text("\n".join(lines))
    else:
        must = "accept"
    note(folder, f"{kind}: {what}")
    if kind == "semantic":
        return drive(rng, folder, corpus / "segmentor.yaml", f"voc_sem_seg:{root}:train", [], must)
    return drive(rng, folder, corpus / "detector.yaml", f"voc:{root}:train", [], must)


def attempt_pattern(rng: random.Random, corpus: Path, folder: Path) -> str:
    """Patterns of tar shards, which are lists too."""
    pattern = rng.choice((
        "{000..999999999}.tar", "{0..1}" * 40 + ".tar", "{9..0}.tar", "{a..z}.tar", "{}.tar",
        "{.tar", "{0..1}{0..1}.tar", "*.tar", "*/*/*.tar", "\0.tar", "none.tar", "{1,2}.tar",
        "[.tar", "{" + "9" * 5000 + "..1}.tar", "{1..0x10}.tar", "-.tar", "x" * 5000 + ".tar",
    ))  # fmt: skip
    (folder / "d").mkdir()
    (folder / "d/0.tar").write_bytes(rng.choice((b"", b"x" * 600, bytes(10240))))
    note(folder, f"shards: {pattern[:40]!r}")
    step = run_command(folder, PRETRAIN, f"{folder}/d/{pattern}", *MOCO, "--iterations", 1,
                       "--output", folder / "run")  # fmt: skip
    return complaint(step, "refuse")


# -- images and label maps ------------------------------------------------------------------------


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_of_size(data: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header, whose checksum is right."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def odd_images(rng: random.Random, image: Image.Image) -> dict[str, tuple[bytes, str, str]]:
    """What -> (content, extension, what must come of it); `image` is RGB."""
    grey = np.array(image.convert("L"))
    exif, orientation = Image.Exif(), rng.choice((0, 1, 2, 3, 4, 9, 20, 65535))
    exif[0x0112] = orientation
    jpeg, png = encoded(image, "JPEG", quality=92), encoded(image, "PNG")
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    tail = rng.choice(
        (b"\0", b"ftypmp42" + b"\x00\xff\xda\x01" * 50, b"trailer!" * 12, b"\xff\xda")
    )
    alpha = image.copy()
    alpha.putalpha(128)
    side = rng.choice((20_000, 60_000, 2**31 - 1))
    return {
        "bytes after the end of a JPEG": (jpeg + tail, ".jpg", "accept"),
        "bytes after the end of a PNG": (png + tail, ".png", "accept"),
        "CMYK": (encoded(image.convert("CMYK"), "JPEG"), ".jpg", "accept"),
        "alpha": (encoded(alpha, "PNG"), ".png", "accept"),
        "grey": (encoded(image.convert("L"), "JPEG"), ".jpg", "accept"),
        "palette": (encoded(image.convert("P"), "PNG"), ".png", "accept"),
        "one bit": (encoded(image.convert("1"), "PNG"), ".png", "accept"),
        "16 bit": (encoded(sixteen, "PNG"), ".png", "accept"),
        "progressive": (encoded(image, "JPEG", progressive=True), ".jpg", "accept"),
        f"EXIF orientation {orientation}": (encoded(image, "JPEG", exif=exif), ".jpg", "accept"),
        "BMP": (encoded(image, "BMP"), ".bmp", "accept"),
        "TIFF": (encoded(image, "TIFF"), ".tiff", "accept"),
        "float TIFF": (encoded(Image.fromarray(grey / np.float32(255)), "TIFF"), ".tiff", "refuse"),
        "half a JPEG": (jpeg[: len(jpeg) // 2], ".jpg", "refuse"),
        "half a PNG": (png[: len(png) // 2], ".png", "refuse"),
        "JPEG without its end": (jpeg[:-2], ".jpg", "any"),
        "giant PNG": (png_of_size(png, side, side), ".png", "refuse"),
        "PNG of no size": (png_of_size(png, 0, 0), ".png", "refuse"),
        "no image": (b"<html>", ".jpg", "refuse"),
        "nothing": (b"", ".jpg", "refuse"),
    }


def prepare_images(corpus: Path) -> None:
    prepare_voc(corpus)
    for image in ("a_000000_000019", "a_000001_000019"):
        for part in ("leftImg8bit", "gtFine"):
            (corpus / "cityscapes" / part / "train" / "a").mkdir(parents=True, exist_ok=True)
        numbers = np.full((48, 64), 7, dtype=np.uint16)
        numbers[4:24, 4:20], numbers[10:40, 30:50], numbers[40:, :9] = 24000, 26001, 33
        folder = corpus / "cityscapes"
        picture(1).save(folder / f"leftImg8bit/train/a/{image}_leftImg8bit.png")
        maps = folder / f"gtFine/train/a/{image}_gtFine_instanceIds.png"
        Image.fromarray(numbers).save(maps)


def attempt_image(rng: random.Random, corpus: Path, folder: Path) -> str:
    use = rng.choices(("voc", "pretrain", "semantic", "cityscapes"), (4, 3, 2, 2))[0]
    source = "voc" if use == "pretrain" else use
    root = folder / source
    shutil.copytree(corpus / source, root)
    maps = {"semantic": "SegmentationClass/*.png", "cityscapes": "gtFine/train/a/*.png"}
    if use in maps and rng.random() < 0.7:
        what, must = change_map(rng, rng.choice(sorted(root.glob(maps[use]))), use)
    else:
        photographs = "leftImg8bit/train/a/*.png" if use == "cityscapes" else "JPEGImages/*.jpg"
        what, must = change_image(rng, sorted(root.glob(photographs))[0], use in maps)
    note(folder, f"{use}: {what}")
    if use == "pretrain":
        step = run_command(folder, PRETRAIN, root / "JPEGImages", *MOCO, "-b", 6,
                           "--iterations", 1, "--output", folder / "run")  # fmt: skip
        return complaint(step, must)
    if use == "voc":
        return drive(rng, folder, corpus / "detector.yaml", f"voc:{root}:train", [], must, 0.3)
    if use == "semantic":
        name = f"voc_sem_seg:{root}:train"
        return drive(rng, folder, corpus / "segmentor.yaml", name, [], must, 0.3)
    options = [*MASKS, "INPUT.MASK_FORMAT", "bitmask", "MODEL.ROI_HEADS.NUM_CLASSES", 8]
    name = f"cityscapes:{root}:train"
    return drive(rng, folder, corpus / "detector.yaml", name, options, must, 0.3)


def change_image(rng: random.Random, path: Path, keep_name: bool) -> tuple[str, str]:
    kind = rng.choices(("bytes", "odd image", "odd", "none"), (4, 8, 0.4, 0.4))[0]
    if kind == "none":
        return "unchanged", "accept"
    if kind == "odd":
        return odd_file(rng, path), "refuse"
    if kind == "bytes":
        data, what = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return what, "any"
    found = odd_images(rng, Image.open(path).convert("RGB"))
    what = rng.choice(sorted(found))
    data, extension, must = found[what]
    path.unlink()
    (path if keep_name else path.with_suffix(extension)).write_bytes(data)
    return what, "any" if keep_name else must


def change_map(rng: random.Random, path: Path, use: str) -> tuple[str, str]:
    """Damage a label map, or draw other labels into it."""
    image = Image.open(path)
    labels = np.array(image)
    kind = rng.choices(("bytes", "labels", "size", "form", "odd"), (4, 5, 1, 3, 0.5))[0]
    if kind == "odd":
        return odd_file(rng, path), "refuse"
    if kind == "bytes":
        data, what = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"map: {what}", "any"
    if kind == "size":
        data, side = path.read_bytes(), rng.choice((0, 1, 47, 20_000, 60_000))
        path.write_bytes(png_of_size(data, side, side))
        return f"map: {side} pixels in its header", "refuse"
    if kind == "labels":
        highest = np.iinfo(labels.dtype).max
        label = rng.choice((0, 1, 3, 24, 34, 99, 254, 255, 24001, 26999, 34000, highest))
        labels[rng.randrange(40) :, rng.randrange(40) :] = min(label, highest)
        changed = Image.fromarray(labels)
        if image.mode == "P":
            changed = changed.convert("P")
            changed.putdata(labels.reshape(-1).tolist())
        changed.save(path)
        return f"map: label {label}", "any"
    form = rng.choice(("RGB", "1", "F", "I;16", "LA", "CMYK"))
    file = io.BytesIO()
    if form == "I;16":
        Image.fromarray(labels.astype(np.uint16) * 257).save(file, "PNG")
    else:
        tiff = form in ("F", "CMYK")
        Image.fromarray(labels.astype(np.uint8)).convert(form).save(file, "TIFF" if tiff else "PNG")
    path.unlink()
    path.write_bytes(file.getvalue())
    return f"map: {form}", "any" if use == "cityscapes" else "refuse" if form != "LA" else "any"
