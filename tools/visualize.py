#!/usr/bin/env python
"""Draw the annotations or the predictions of a data set on its images, for every task.

python tools/visualize.py --dataset coco_2017_val --limit 12 --sheet
python tools/visualize.py --config-file configs/X.yaml --ids 139 285
python tools/visualize.py --config-file configs/X.yaml
    --predictions output/inference/coco_2017_val.json --beside

Boxes with class and score, masks, keypoints with their skeleton, dense pose (points and surfaces,
a hue for each part of the body, brighter with U and more saturated with V), semantic label maps,
depth maps (from red, near, to blue, 10 m and more).
"""

import argparse
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
    add("--limit", type=at_least(0), default=20, metavar="N", help="images; 0: all")
    add("--ids", nargs="+", metavar="ID", help="image ids (default: the first --limit)")
    add("--max-image-pixels", type=int, metavar="N",
        help=f"pixels; larger image files are refused (default: the config's, or {MAX_PIXELS})",
    )  # fmt: skip
    add("--sheet", action="store_true", help="all on one contact sheet, sheet.png")
    add("--width", type=at_least(1, 10_000), metavar="PIXELS",
        help=f"of each picture (default: the image's; on a sheet {SHEET_CELL})")  # fmt: skip
    add("--output", type=Path, default=Path("output/pictures"), metavar="DIR",
        help="folder of the pictures")  # fmt: skip
    add_config_option(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start_command(parse)  # --help and mistakes end here, before the imports that take seconds

import re
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from moco_det import visualize
from moco_det.common.images import allow_pixels
from moco_det.config.loading import load_config
from moco_det.datasets import Dataset, Record, get_dataset
from moco_det.datasets.problems import SkippedProblems
from moco_det.evaluation.predictions import read_predictions

NOTHING = {"boxes": [], "scores": [], "classes": [], "sem_seg": []}  # of an image in no prediction


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with exit_cleanly():
        make_folder(args.output, "--output")
        problems = SkippedProblems()
        dataset = get_dataset(args.dataset or configured_dataset(args), problems)
        if args.max_image_pixels:
            allow_pixels(args.max_image_pixels)
        records = chosen_records(dataset.records(problems), dataset.name, args.ids, args.limit)
        predictions = read_predictions(args.predictions, dataset) if args.predictions else None
        pictures = {}
        for record in records:
            try:
                pictures[record["image_id"]] = picture = draw(record, dataset, predictions, args)
            except UserError as error:
                problems.refuse("image", error)
                continue
            if not args.sheet:
                save(picture, args.output, str(record["image_id"]))
                pictures[record["image_id"]] = None
        if not pictures:
            raise UserError(f"dataset {dataset.name}: there is no image to draw")
        if args.sheet:
            cell = args.width or SHEET_CELL
            names = [Path(r["file_name"]).name for r in records if r["image_id"] in pictures]
            sheet = visualize.contact_sheet(list(pictures.values()), cell, names)
            save(sheet, args.output, "sheet")


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


def save(picture: Tensor, folder: Path, name: str) -> None:
    path = folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(picture).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    print(path)


if __name__ == "__main__":
    main()
