#!/usr/bin/env python
"""Pretrain a ResNet with MoCo v1 or v2, end-to-end or with a memory bank, on unlabelled images.

    python pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml
    torchrun --nproc_per_node 8 pretrain/main.py DATA --recipe configs/pretrain/moco_v2_r50.yaml

Flags are those of facebookresearch/moco's main_moco.py, with a few more.
"""

try:
    from moco_det.common.errors import start_command
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}: pip install -e . in the folder of moco_det") from None
from pretrain.flags.pretraining import parse_pretraining

if __name__ == "__main__":
    start_command(
        parse_pretraining
    )  # --help and mistakes end here, before the imports that take seconds

import argparse
from pathlib import Path

import torch

from moco_det.common.errors import UserError
from moco_det.common.images import allow_pixels
from moco_det.common.processes import StopRequest, print_on_main, workers_per_process, world_size
from pretrain.data import is_shards
from pretrain.data.augmentations import MoCoAugmentation, MoCoCrop
from pretrain.data.images import FolderSource, training_folder
from pretrain.data.shards import ShardSource, find_shards
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.device import seed_run, settle_precision
from pretrain.engine.diagnosis import Doctor
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD, build_schedule
from pretrain.engine.pretraining import MoCoPretraining
from pretrain.engine.trainer import Trainer
from pretrain.evaluation.knn import KnnMonitor
from pretrain.flags.launch import launch, loading, run_settings
from pretrain.moco import MECHANISMS, build_mechanism
from pretrain.moco.encoders import build_encoder
from pretrain.moco.grouped_batchnorm import choose_bn_groups
from pretrain.moco.instance_discrimination import InstanceDiscrimination
from pretrain.moco.losses import LOSSES


def pretrain(args: argparse.Namespace, device: torch.device) -> None:
    """From images to a checkpoint, on `device`; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    output = Path(args.output)
    claim = checkpoints.claimed_output(output, args.resume, args.overwrite)
    with StopRequest() as stop, claim:
        checkpoint = checkpoints.find(args.resume, output)
        if checkpoint and args.restart_epoch:
            checkpoint = checkpoints.restart_epoch(checkpoint)
        seed = seed_run(args.seed, checkpoint, args.deterministic)
        args.amp = settle_precision(args.amp, device, checkpoint)
        source = build_source(args, device, seed)
        model = build_model(args, source.samples)
        model = model.to(device, memory_format=torch.channels_last)
        task = build_task(args, model, source, seed)
        if checkpoint:
            check_method(args, checkpoint)
            checkpoints.load_model(model, checkpoint, args.arch)
        describe(args, source, model, device, seed)
        settings = run_settings(args, seed)
        Trainer(task, settings, stop, checkpoint, args.iterations, Doctor(output)).train()


def build_source(
    args: argparse.Namespace, device: torch.device, seed: int
) -> FolderSource | ShardSource:
    """Where views come from. Raises UserError for data that cannot fill a batch."""
    on_device = args.augment_on == "device" or (args.augment_on == "auto" and device.type != "cpu")
    made_by_workers = MoCoCrop if on_device else MoCoAugmentation
    augmentation = made_by_workers(
        args.image_size, args.aug_plus, args.color_strength, args.crop_min
    )
    augmentations = [augmentation] * MECHANISMS[args.mechanism].num_views
    batches = loading(args, device, seed)
    if is_shards(args.data):
        samples = args.samples_per_epoch or args.iterations * args.batch_size
        shards = find_shards(args.data)
        return ShardSource(shards, augmentations, batches, samples, args.shuffle_buffer)
    return FolderSource(training_folder(Path(args.data)), augmentations, batches)


def build_model(args: argparse.Namespace, samples: int) -> InstanceDiscrimination:
    """The mechanism for a data set of `samples` images. Raises UserError for a batch that cannot
    be split, or is all of the data that a memory bank draws from."""
    bank = args.mechanism == "memory-bank"
    shuffled = args.shuffle_bn and not bank  # the bank's keys are not encoded
    groups = choose_bn_groups(args.batch_size, world_size(), args.bn_groups, shuffled)
    if bank and samples <= args.batch_size:
        raise UserError(
            f"--mechanism memory-bank draws negatives from the images beside the batch: {samples} "
            f"images leave none to a batch of {args.batch_size}; pass a smaller --batch-size"
        )
    return build_mechanism(
        args.mechanism,
        build_encoder(args.arch, args.moco_dim, args.mlp, args.small_stem),
        dim=args.moco_dim,
        negatives=args.moco_k,
        samples=samples,
        key_momentum=args.moco_m,
        bank_momentum=args.bank_momentum,
        temperature=args.moco_t,
        bn_groups=groups,
        shuffle_bn=shuffled,
    )


def build_task(
    args: argparse.Namespace, model: InstanceDiscrimination, source, seed: int
) -> MoCoPretraining:
    """Optimizer, loss and kNN monitor added to model and data."""
    device = model.pixel_mean.device
    schedule = build_schedule(
        args.schedule, args.epochs, args.iterations, args.cos, args.lr_decay, args.lr_decay_every,
        args.warmup_epochs, source.steps_per_epoch,
    )  # fmt: skip
    sgd = args.lr, args.momentum, args.weight_decay
    scaled, lars = args.amp == "fp16", args.optimizer == "lars"
    optimizer = ScheduledSGD(model, *sgd, schedule, scale_gradients=scaled, lars=lars)
    monitor = None
    data = Path(args.data)
    if args.knn_every and KnnMonitor.applies_to(data):
        workers = workers_per_process(args.workers)
        try:
            monitor = KnnMonitor(
                data, args.image_size, workers, device, bank_size=args.knn_bank, seed=seed
            ).top1
        except UserError as error:  # on every process alike; it must not stop a run
            print_on_main(f"warning: no kNN monitor: {error}")
    return MoCoPretraining(
        model,
        LOSSES[args.loss]().to(device),
        optimizer,
        source,
        seed,
        AMP_DTYPES[args.amp],
        monitor=monitor,
        knn_every=args.knn_every,
        keep=args.keep,
        save_every=args.save_every,
        compilation=args.compile,
    )


def check_method(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError where the checkpoint is that of another mechanism, loss or optimizer."""
    config = checkpoint.state.get("config", {})  # the official code writes none
    for flag, official in (("mechanism", "moco"), ("loss", "infonce"), ("optimizer", "sgd")):
        before = config.get(flag, official)
        if before != getattr(args, flag):
            raise UserError(
                f"{checkpoint.path} was trained with --{flag} {before}; resume it with that"
            )


def describe(args, source, model: InstanceDiscrimination, device: torch.device, seed: int) -> None:
    """The first lines of a run."""
    groups, processes = model.bn_groups, world_size()
    print_on_main(
        f"{source.describe()}, {source.steps_per_epoch} steps an epoch; "
        f"global batch {args.batch_size} = {processes} process(es) x {groups} BN group(s) "
        f"x {args.batch_size // processes // groups}; {device}, seed {seed}, output {args.output}"
    )
    shuffled = "with" if model.shuffle_bn else "without"
    print_on_main(f"{args.mechanism}, {args.loss}, {shuffled} shuffled BN")
    if args.knn_every and not KnnMonitor.applies_to(Path(args.data)):
        print_on_main(f"no kNN monitor: {args.data} lacks class folders in train/ and val/")


if __name__ == "__main__":
    launch(pretrain, parse_pretraining)
