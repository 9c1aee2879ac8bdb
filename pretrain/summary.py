#!/usr/bin/env python
"""Fill a checkpoint's page: kNN, the linear protocol and fine-tuning, as one table.

    python pretrain/summary.py DATA --pretrained output/checkpoint_last.pth.tar --output DIR
    torchrun --nproc_per_node 8 pretrain/summary.py IMAGENET --pretrained CHECKPOINT --output DIR \\
        --lists 1=1percent.txt 10=10percent.txt

Each stage is a run of knn.py or linear.py and has its folder in DIR. Killed and started again, it
goes on; what is finished is not run again. DIR gets summary.json, flat numbers in percent, and
summary.md, the table.

    knn            k = 20 and 200 at a temperature of 0.07
    linear         the protocol of MoCo (arXiv:1911.05722, Section 4.1)
    finetune_1     1 % and 10 % of the labels: 60 and 30 epochs at a learning rate of 0.05 for a
    finetune_10    batch of 256, as in the appendix of SimCLR (arXiv:2002.05709), by plain SGD
    finetune_100   all of them, the protocol of MoCo's A.7
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.evaluation import parse_linear, parse_summary

if __name__ == "__main__":
    start_command(parse_summary)  # --help and mistakes end before the imports that take seconds

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from moco_det.common.documents import read_json
from moco_det.common.errors import UserError
from moco_det.common.files import file_hash, make_folder, write_json, write_text
from moco_det.common.images import allow_pixels
from moco_det.common.processes import (
    from_main,
    on_main,
    print_on_main,
    workers_per_process,
    world_size,
)
from pretrain import linear
from pretrain.data.benchmarks import find_dataset
from pretrain.data.labelled import LabelledSplit, Splits, class_balanced, listed_images
from pretrain.engine.checkpoints import LAST
from pretrain.engine.diagnosis import LOG, read_records
from pretrain.evaluation.classification import BEST
from pretrain.evaluation.features import load_encoder
from pretrain.evaluation.knn import KnnMonitor
from pretrain.flags.launch import launch

NEIGHBOURS = (20, 200)


@dataclass(frozen=True)
class Training:
    """A stage that trains, in linear.py's words; `lr` is for a batch of 256."""

    title: str
    epochs: int
    schedule: tuple[int, ...]
    lr: float
    weight_decay: float
    share: float | None = None  # of the labels, to fine-tune on; None: the linear protocol


TRAININGS = {
    "linear": Training("linear classifier", 100, (60, 80), 30.0, 0.0),
    "finetune_1": Training("fine-tuning, 1 % of the labels", 60, (), 0.05, 0.0, 0.01),
    "finetune_10": Training("fine-tuning, 10 % of the labels", 30, (), 0.05, 0.0, 0.1),
    "finetune_100": Training("fine-tuning, all labels", 100, (70, 90), 0.03, 1e-4, 1.0),
}


def summarize(args: argparse.Namespace, device: torch.device) -> None:
    """Run what is not finished, print and write the table; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    output = Path(args.output)
    on_main(make_folder, output, "--output")
    splits = find_dataset(args.dataset, Path(args.data), args.download)
    stages = {name: part_of(name, splits[1], args) for name in args.stages if name != "knn"}
    on_main(check_settings, output / "settings.json", settings(args))
    if "knn" in args.stages:
        neighbours(output / "knn.json", splits, args, device)
    for name, part in stages.items():
        train(name, part, args, device)
    on_main(write_summary, output, args.epochs)


def settings(args: argparse.Namespace) -> dict:
    """What the numbers depend on, for a folder not to hold those of two checkpoints."""
    given = Path(args.pretrained).is_file()
    names = ("arch", "image_size", "small_stem", "dataset", "batch_size", "epochs", "seed")
    return {
        "pretrained": args.pretrained,
        "weights": file_hash(Path(args.pretrained)) if given else args.pretrained,
        "data": os.path.abspath(args.data),
        "lists": args.lists,
        "cache_features": args.cache_features,
    } | {name: getattr(args, name) for name in names}


def check_settings(path: Path, now: dict) -> None:
    """Raises UserError where the folder has numbers of another checkpoint or other flags."""
    begun = any((path.parent / name).exists() for name in ("knn.json", *TRAININGS))
    if not (begun and path.exists()):
        write_json(path, now)
        return
    before = read_json(path, "the settings of a summary")
    if not isinstance(before, dict):
        raise UserError(f"{path} does not hold the settings of a summary: remove that folder")
    for name in now.keys() - {"pretrained"}:
        if before.get(name) != now[name]:
            raise UserError(
                f"{path.parent} holds a summary with another {name}, {before.get(name)!r}: pass "
                "another --output"
            )


def part_of(name: str, train: LabelledSplit, args: argparse.Namespace) -> LabelledSplit:
    """The images that a stage trains on. Raises UserError for too few, or lists that do not fit."""
    share = TRAININGS[name].share or 1.0
    if name in args.lists:
        part = listed_images(train, Path(args.lists[name]))
    else:
        part = class_balanced(train, share, args.seed) if share < 1 else train
    if len(part.paths) < 2 * world_size():
        raise UserError(
            f"{part.name} has fewer than two images for each process: leave {name} out of --stages"
        )
    return part


def neighbours(path: Path, splits: Splits, args: argparse.Namespace, device: torch.device) -> None:
    """Write kNN's accuracies, unless they are there."""
    if from_main(path.is_file()):  # for all processes to go the same way
        return
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.pretrained, args.arch, 1, args.small_stem)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    workers = workers_per_process(args.workers)
    knn = KnnMonitor(Path(args.data), args.image_size, workers, device, splits=splits)
    top1 = knn.top1_of(encoder, NEIGHBOURS)
    values = {f"knn_{k}_top1": value for k, value in zip(NEIGHBOURS, top1, strict=True)}
    on_main(write_json, path, values)


def train(name: str, part: LabelledSplit, args: argparse.Namespace, device: torch.device) -> None:
    """Run linear.py for a stage to its end, or from where it stopped, unless it is finished."""
    training = TRAININGS[name]
    epochs = args.epochs or training.epochs
    folder = Path(args.output) / name
    if from_main(on_main(is_finished, folder, epochs)):
        return
    print_on_main(f"\n{training.title}: {folder}")
    batch = min(args.batch_size, len(part.paths) // world_size() * world_size())
    schedule = [round(epoch * epochs / training.epochs) for epoch in training.schedule]
    words = {
        "--pretrained": args.pretrained, "--output": folder, "--resume": "auto", "-a": args.arch,
        "--image-size": args.image_size, "--max-image-pixels": args.max_image_pixels,
        "-j": args.workers, "-b": batch, "--epochs": epochs, "--lr": training.lr * batch / 256,
        "--wd": training.weight_decay, "--seed": args.seed, "--amp": args.amp,
        "--dataset": args.dataset, "--max-unreadable": args.max_unreadable,
        "--print-freq": args.print_freq,
    }  # fmt: skip
    argv = [args.data, *(str(word) for pair in words.items() for word in pair)]
    argv += ["--schedule", *map(str, schedule), *["--small-stem"] * args.small_stem]
    if training.share is None:
        argv += ["--cache-features"] * args.cache_features
    else:
        argv += ["--finetune"]
        if name in args.lists:
            argv += ["--list", args.lists[name]]
        elif training.share < 1:
            argv += ["--train-share", str(training.share)]
    linear.classify(parse_linear(argv), device)


def is_finished(folder: Path, epochs: int) -> bool:
    """Whether a run's last epoch was validated; what a kill has left of none is removed."""
    if not (folder / LAST).is_file():
        (folder / BEST).unlink(missing_ok=True)  # it would pass for another run's
    return validation(folder).get("epoch") == epochs


def validation(folder: Path) -> dict:
    """The last one of a run of linear.py; {} where there was none."""
    path = folder / LOG
    records = read_records(path) if path.is_file() else []
    found = [record for record in records if {"epoch", "val_acc1", "val_acc5"} <= record.keys()]
    return found[-1] if found else {}


def write_summary(output: Path, epochs: int | None) -> None:
    """The numbers and the table of all stages that DIR holds; `epochs` as the flag."""
    values, rows = {}, []
    if (output / "knn.json").is_file():
        values = read_accuracies(output / "knn.json")
        rows = [(f"kNN, k = {k}", values[f"knn_{k}_top1"], None) for k in NEIGHBOURS]
    for name, training in TRAININGS.items():
        last, length = validation(output / name), epochs or training.epochs
        if last.get("epoch") == length:
            top1, top5 = last["val_acc1"], last["val_acc5"]
            values |= {f"{name}_top1": top1, f"{name}_top5": top5}
            rows.append((f"{training.title}, {length} epochs", top1, top5))
    table = tabulate(rows, ["evaluation", "top-1 (%)", "top-5 (%)"], "github", floatfmt=".2f")
    write_json(output / "summary.json", values)
    write_text(output / "summary.md", f"{table}\n")
    print(f"\n{table}\n\nwritten to {output / 'summary.json'} and {output / 'summary.md'}")


def read_accuracies(path: Path) -> dict[str, float]:
    """Of `neighbours`. Raises UserError for another file."""
    values = read_json(path, "kNN's accuracies")
    names = [f"knn_{k}_top1" for k in NEIGHBOURS]
    if not isinstance(values, dict) or not all(type(values.get(n)) is float for n in names):
        raise UserError(f"{path} does not hold {' and '.join(names)}: remove it")
    return values


if __name__ == "__main__":
    launch(summarize, parse_summary)
