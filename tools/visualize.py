#!/usr/bin/env python
"""Draw the annotations or the predictions of a data set on its images, for every task.

python tools/visualize.py --dataset coco_2017_val --limit 12 --sheet
python tools/visualize.py --config-file configs/X.yaml --ids 139 285
python tools/visualize.py --config-file configs/X.yaml
    --predictions output/inference/coco_2017_val.json --beside
python tools/visualize.py cam output/linear/checkpoint_last.pth.tar IMAGES --sheet

Boxes with class and score, masks, keypoints with their skeleton, dense pose (points and surfaces,
a hue for each part of the body, brighter with U and more saturated with V), semantic label maps,
depth maps (from red, near, to blue, 10 m and more).
`cam` draws where in any images a classifier of pretrain/linear.py sees its class.
"""

import argparse
import sys
from pathlib import Path

try:
    from moco_det.common.errors import (
        UserError,
        at_least,
        command_parser,
        exit_cleanly,
        start_command,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from moco_det.common.files import MAX_PIXELS, make_folder
from moco_det.config.flags import add_config_file, add_config_option

SHEET_CELL = 480  # pixels


def parse(arguments: list[str] | None) -> argparse.Namespace:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["cam"]:
        return parse_cam(arguments[1:])
    parser = command_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="NAME",
        help="a name as in DATASETS.TEST (default: the config's)")  # fmt: skip
    add_config_file(source, help="YAML config: its first test set (default: none)")
    add = parser.add_argument
    add("--train", action="store_true", help="draw the config's first training set")
    add("--predictions", type=Path, metavar="FILE",
        help="OUTPUT_DIR/inference/NAME.json of a run (default: the annotations)")  # fmt: skip
    add("--score-threshold", type=float, default=0.5, metavar="S",
        help="lowest score that is drawn, in [0, 1]")  # fmt: skip
    add("--beside", action="store_true",
        help="with --predictions: draw the annotations on the left")  # fmt: skip
    add("--ids", nargs="+", metavar="ID", help="image ids (default: the first --limit)")
    add_output_flags(parser)
    add_config_option(parser)
    parser.set_defaults(classifier=None)
    return parser.parse_args(arguments)


def parse_cam(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("Draw where in images a classifier sees its class (arXiv:1512.04150).")
    parser.prog += " cam"
    add = parser.add_argument
    add("classifier", type=Path, metavar="CHECKPOINT", help="of a run of pretrain/linear.py")
    add("images", type=Path, nargs="+", metavar="IMAGES", help="files, or folders of images")
    add("--class", dest="wanted", default="", metavar="NAME",
        help="the class (default: of each image the most probable one)")  # fmt: skip
    add("--beside", action="store_true", help="draw the image itself on the left")
    add_output_flags(parser)
    return parser.parse_args(arguments)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--limit", type=at_least(0), default=20, metavar="N", help="images; 0: all")
    add("--max-image-pixels", type=int, metavar="N",
        help=f"pixels; larger image files are refused (default: a config's, or {MAX_PIXELS})",
    )  # fmt: skip
    add("--sheet", action="store_true", help="all on one contact sheet, sheet.png")
    add("--width", type=at_least(1, 10_000), metavar="PIXELS",
        help=f"of each picture (default: the image's; on a sheet {SHEET_CELL})")  # fmt: skip
    add("--output", type=Path, default=Path("output/pictures"), metavar="DIR",
        help="folder of the pictures")  # fmt: skip


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from moco_det import visualize
from moco_det.common.images import UnreadableImage, allow_pixels, read_image
from moco_det.config.loading import load_config
from moco_det.datasets import Dataset, Record, get_dataset
from moco_det.datasets.problems import SkippedProblems
from moco_det.evaluation.predictions import read_predictions
from pretrain.data.listing import find_images
from pretrain.evaluation.class_activation import load_image_classifier

NOTHING = {"boxes": [], "scores": [], "classes": [], "sem_seg": []}  # of an image in no prediction


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly():
        make_folder(args.output, "--output")
        if args.classifier:
            draw_activations(args)
            return
        problems = SkippedProblems()
        dataset = get_dataset(args.dataset or configured_dataset(args), problems)
        if args.max_image_pixels:
            allow_pixels(args.max_image_pixels)
        records = chosen_records(dataset.records(problems), dataset.name, args.ids, args.limit)
        predictions = read_predictions(args.predictions, dataset) if args.predictions else None
        pictures = {}
        files = file_names(str(record["image_id"]) for record in records)
        for record, file in zip(records, files, strict=True):
            try:
                pictures[record["image_id"]] = picture = draw(record, dataset, predictions, args)
            except UserError as error:
                problems.refuse("image", error)
                continue
            if not args.sheet:
                save(picture, args.output, file)
                pictures[record["image_id"]] = None
        if not pictures:
            raise UserError(f"dataset {dataset.name}: there is no image to draw")
        if args.sheet:
            names = [Path(r["file_name"]).name for r in records if r["image_id"] in pictures]
            save_sheet(list(pictures.values()), names, args)


def configured_dataset(args: argparse.Namespace) -> str:
    """The name of the config's first data set; its limit on pixels is set."""
    cfg = load_config(args.config_file, args.opts)
    allow_pixels(cfg.INPUT.MAX_IMAGE_PIXELS)
    names, key = (cfg.DATASETS.TRAIN, "TRAIN") if args.train else (cfg.DATASETS.TEST, "TEST")
    if not names:
        raise UserError(f"{args.config_file}: DATASETS.{key} names no data set")
    return names[0]


def chosen_records(
    records: list[Record], name: str, ids: list[str] | None, limit: int
) -> list[Record]:
    """Of a data set's records those of some image ids, or the first `limit`; all where it is 0."""
    if not ids:
        return records[: limit or None]
    record_of = {str(record["image_id"]): record for record in records}
    unknown = [image_id for image_id in ids if image_id not in record_of]
    if unknown:
        some = ", ".join(list(record_of)[:3])
        raise UserError(f"{name} has no image {', '.join(unknown)}; its ids are {some}, ...")
    return [record_of[image_id] for image_id in ids]


def draw(
    record: Record,
    dataset: Dataset,
    predictions: dict[str, dict[str, Any]] | None,
    args: argparse.Namespace,
) -> Tensor:
    """The picture of one image; an image without a prediction is drawn without objects."""
    image = visualize.read_image(record)
    scale = args.width / image.shape[2] if args.width else 1
    found = {} if predictions is None else predictions.get(str(record["image_id"]), NOTHING)
    pictures = []
    if predictions is None or args.beside:
        pictures.append(visualize.draw_annotations(image, record, dataset, scale=scale))
    if predictions is not None:
        threshold = args.score_threshold
        pictures.append(visualize.draw_prediction(image, found, dataset, threshold, scale=scale))
    return torch.cat(pictures, dim=2)


def draw_activations(args: argparse.Namespace) -> None:
    """The activation maps of a classifier on the images that are named."""
    if args.max_image_pixels:
        allow_pixels(args.max_image_pixels)
    classifier = load_image_classifier(args.classifier)
    if args.wanted:
        classifier.check_class(args.wanted)
    pictures = []
    images = image_files(args.images)[: args.limit or None]
    files = file_names(name for _, name in images)
    for (path, name), file in zip(images, files, strict=True):
        try:
            pixels = read_image(path)
        except UnreadableImage as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            continue
        found, probability, heat = classifier.explain(pixels, args.wanted)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        scale = args.width / image.shape[2] if args.width else 1
        label = f"{found} {probability:.0%}"
        # On a sheet, where pictures shrink, it stands below with the name.
        picture = visualize.draw_heat(image, heat, "" if args.sheet else label, scale)
        if args.beside:
            picture = torch.cat([visualize.enlarged(image, scale), picture], dim=2)
        if not args.sheet:
            save(picture, args.output, file)
        pictures.append((f"{name}: {label}", picture if args.sheet else None))
    if not pictures:
        raise UserError("there is no image to draw")
    if args.sheet:
        names, drawn = zip(*pictures, strict=True)
        save_sheet(list(drawn), list(names), args, 1 + args.beside)


def image_files(paths: list[Path]) -> list[tuple[Path, str]]:
    """Files, and those in folders, each with a name that tells it from the others."""
    found = []
    for path in paths:
        if path.is_dir():
            inner = [Path(os.fsdecode(name)) for name in find_images(path)]
            found += [(path / name, str(name.with_suffix(""))) for name in inner]
        else:
            found.append((path, path.stem))
    names = Counter(name for _, name in found)
    return [(path, name if names[name] == 1 else str(path.with_suffix(""))) for path, name in found]


def file_names(names: Iterable[str]) -> list[str]:
    """Of pictures, without an ending, in characters that any system takes; each another one, such
    as "_" and "__2" for "ä" and "ö"."""
    found: dict[str, None] = {}
    for name in names:
        first = plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
        number = 1
        while plain in found:
            number += 1
            plain = f"{first}_{number}"
        found[plain] = None
    return list(found)


def save_sheet(
    pictures: list[Tensor], names: list[str], args: argparse.Namespace, beside: int = 1
) -> None:
    """`beside`: how many pictures of the width are beside one another in each of `pictures`."""
    sheet = visualize.contact_sheet(pictures, beside * (args.width or SHEET_CELL), names)
    save(sheet, args.output, "sheet")


def save(picture: Tensor, folder: Path, name: str) -> None:
    """`name`: see `file_names`."""
    path = folder / f"{name}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(picture).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    print(path)


if __name__ == "__main__":
    main()
