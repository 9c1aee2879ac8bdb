#!/usr/bin/env python
"""Train a classifier on a pretrained encoder: a linear one on its frozen features, or end to end.

    python pretrain/linear.py DATA --pretrained output/checkpoint_last.pth.tar
    torchrun --nproc_per_node 8 pretrain/linear.py DATA --pretrained CHECKPOINT
    python pretrain/linear.py DATA --resume output/linear/checkpoint_best.pth.tar --evaluate
    python pretrain/linear.py DATA --finetune --pretrained CHECKPOINT
    python pretrain/linear.py DATA --recipe configs/linear/food101_r50.yaml --pretrained CHECKPOINT

Flags are those of facebookresearch/moco's main_lincls.py, with a few more. The learning rate is
for a global batch of 256, the total over all processes, and is not scaled automatically: with
another --batch-size B pass 30 * B / 256. An epoch's last, incomplete batch is dropped.

With --finetune all weights are trained, under batch statistics, and the defaults are A.7's --lr
0.03, A.6's --schedule 70 90 and --wd 1e-4 (arXiv:1911.05722). DATA may be iNaturalist 2018 as it is
published (A.6), and with --dataset one of torchvision's data sets, for both protocols; --list and
--train-share take a part of its labels.

Every process holds the features of all validation images, with --cache-features of all training
images as well: 10 GB for ImageNet and a ResNet-50.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.evaluation import parse_linear

if __name__ == "__main__":
    start_command(parse_linear)  # --help and mistakes end before the imports that take seconds

import argparse
import contextlib
from pathlib import Path

import torch
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.images import allow_pixels
from moco_det.common.processes import StopRequest, on_main, print_on_main, world_size
from pretrain.data.benchmarks import find_dataset
from pretrain.data.images import Loading
from pretrain.data.labelled import (
    LabelledBatches,
    LabelledSplit,
    class_balanced,
    listed_images,
)
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.device import seed_run, settle_precision
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD, build_schedule
from pretrain.engine.trackers import check_packages
from pretrain.engine.trainer import Trainer
from pretrain.evaluation.classification import (
    Classification,
    FeatureBatches,
    FineTuning,
    LinearProbe,
    check_classes,
    evaluate,
    load_classifier,
    validation_line,
)
from pretrain.evaluation.features import RANDOM, SplitFeatures, load_encoder, pooled
from pretrain.flags.launch import launch, loading, run_settings
from pretrain.moco.grouped_batchnorm import choose_bn_groups


def classify(args: argparse.Namespace, device: torch.device) -> None:
    """Train a classifier, or evaluate one, on `device`; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    on_main(check_packages, args.log)
    output = Path(args.output)
    claim = checkpoints.claimed_output(output, args.resume, args.overwrite, args.pretrained)
    with contextlib.nullcontext() if args.evaluate else claim:
        checkpoint = checkpoints.find(args.resume, output)
        if checkpoint and args.restart_epoch:
            checkpoint = checkpoints.restart_epoch(checkpoint)
        if args.evaluate and checkpoint is None:
            raise UserError("--evaluate needs the classifier of a run: pass --resume PATH")
        seed = seed_run(args.seed, checkpoint, args.deterministic)
        args.amp = settle_precision(args.amp, device, checkpoint)
        batching = loading(args, device, seed)
        classes, train, val = find_dataset(args.dataset, Path(args.data), args.download)
        train = labelled_part(train, args, seed)
        if checkpoint:
            check_classes(checkpoint, classes)
        encoder = build_encoder(args, len(classes), checkpoint)
        encoder = encoder.to(device, memory_format=torch.channels_last)
        features = SplitFeatures(val, args.image_size, batching, device, AMP_DTYPES[args.amp])
        if args.evaluate:
            values = evaluate(encoder.fc, *features.compute(pooled(encoder)))
            values["epoch"] = max(args.start_epoch, checkpoint.state["epoch"])
            best = max(values["val_acc1"], float(checkpoint.state.get("best_acc1", 0.0)))
            print_on_main(validation_line(args.epochs, values, best))
            return
        with StopRequest() as stop:
            task = build_task(args, encoder, classes, train, features, batching)
            describe(args, task, train, len(classes), seed)
            Trainer(task, run_settings(args, seed), stop, checkpoint).train()


def labelled_part(train: LabelledSplit, args: argparse.Namespace, seed: int) -> LabelledSplit:
    """What is trained on, of all that the data set has for it."""
    if args.list:
        return listed_images(train, Path(args.list))
    return class_balanced(train, args.train_share, seed) if args.train_share else train


def build_encoder(
    args: argparse.Namespace, classes: int, checkpoint: Checkpoint | None
) -> nn.Module:
    """The encoder with a new classifier, or that of a run.

    An evaluation needs no --pretrained: the run's checkpoint holds the backbone as well.
    """
    if not (args.pretrained or args.evaluate):
        raise UserError("pass --pretrained CHECKPOINT, or `random` for an untrained backbone")
    encoder = load_encoder(args.pretrained or RANDOM, args.arch, classes, args.small_stem)
    # Fine-tuning keeps torchvision's initialisation, as the typical implementation does.
    if not args.finetune:
        nn.init.normal_(encoder.fc.weight, std=0.01)  # as in the official code
        nn.init.zeros_(encoder.fc.bias)
    if checkpoint:
        frozen_from = "" if args.finetune else args.pretrained
        load_classifier(encoder, checkpoint, args.arch, frozen_from)
    return encoder


def build_task(
    args: argparse.Namespace,
    encoder: nn.Module,
    classes: list[str],
    train: LabelledSplit,
    val: SplitFeatures,
    batching: Loading,
) -> Classification:
    """The protocol that the flags ask for, with its batches and the features of val."""
    batches = LabelledBatches(train, args.image_size, batching)
    trained = encoder if args.finetune else encoder.fc
    schedule = build_schedule(args.schedule, args.epochs)
    sgd = args.lr, args.momentum, args.weight_decay
    # The linear protocol's features are fp32, and so is its classifier: no gradient needs scaling.
    scaled = args.finetune and args.amp == "fp16"
    optimizer = ScheduledSGD(trained, *sgd, schedule, scale_gradients=scaled)
    data = {"classes": classes, "data": train.fingerprint}
    if args.finetune:
        groups = choose_bn_groups(args.batch_size, world_size(), args.bn_groups, shuffled=False)
        return FineTuning(
            encoder, optimizer, batches, val.dtype, args.eval_every, val, groups, **data
        )
    backbone = pooled(encoder)  # shares the encoder's weights
    val_features = val.compute(backbone)
    if args.cache_features:
        features = SplitFeatures(train, args.image_size, batching, val.device, val.dtype)
        batches = FeatureBatches(*features.compute(backbone), batching)
        backbone = None
    return LinearProbe(
        encoder, optimizer, batches, val.dtype, args.eval_every, val_features, backbone, **data
    )


def describe(
    args: argparse.Namespace, task: Classification, train: LabelledSplit, classes: int, seed: int
) -> None:
    """The first line of a run. Raises UserError for samples that cannot fill a batch."""
    processes, batch_size, samples = world_size(), args.batch_size, task.batches.samples
    if samples < batch_size or batch_size % processes:
        raise UserError(
            f"--batch-size {batch_size} must be a multiple of the {processes} "
            f"process(es) and at most the {samples} images of {train.name}"
        )
    print_on_main(
        f"{samples} images of {classes} classes, {samples // batch_size} steps an epoch of batches "
        f"of {batch_size}; {processes} process(es), {task.device}, seed {seed}, "
        f"output {args.output}"
    )
    usual = (0.03 if args.finetune else 30.0) * batch_size / 256
    if args.lr > 4 * usual:
        print_on_main(
            f"advice: --lr {args.lr:g} is {args.lr / usual:.2g} times the {usual:.2g} that the "
            f"protocol's rate gives for a batch of {batch_size}: the loss may explode"
        )


if __name__ == "__main__":
    launch(classify, parse_linear)
