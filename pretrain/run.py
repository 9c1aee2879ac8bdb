"""One run of pretraining: from images to a checkpoint.

`main.py` gives `train` its flags, and `pretrain` does so for a Python program, whose keyword
arguments are called like the flags: the two ways differ in nothing but where settings come from.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moco_det.common.errors import UserError, one_line
from moco_det.common.images import allow_pixels
from moco_det.common.processes import (
    StopRequest,
    on_main,
    print_on_main,
    workers_per_process,
    world_size,
)
from pretrain.data import is_shards
from pretrain.data.augmentations import MoCoAugmentation, MoCoCrop
from pretrain.data.images import FolderSource, training_folder
from pretrain.data.multi_crop import STRONG, MultiCrop
from pretrain.data.shards import ShardSource, find_shards
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.device import seed_run, settle_precision
from pretrain.engine.diagnosis import Doctor
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD, build_schedule
from pretrain.engine.pretraining import MoCoPretraining
from pretrain.engine.trackers import check_packages
from pretrain.engine.trainer import Trainer
from pretrain.evaluation.features import pooled
from pretrain.evaluation.knn import KnnMonitor
from pretrain.flags.launch import loading, run_settings, start
from pretrain.flags.pretraining import parse_keywords, pretraining_keywords
from pretrain.moco import MECHANISMS, build_mechanism
from pretrain.moco.encoders import add_head, build_encoder, dry_run
from pretrain.moco.grouped_batchnorm import batchnorms, choose_bn_groups, group_batchnorm
from pretrain.moco.instance_discrimination import InstanceDiscrimination
from pretrain.moco.losses import LOSSES


@dataclass(frozen=True)
class Pretrained:
    """What a run has left.

    Args:
        model: the mechanism, by default a MoCo, whose `encoder_q` is the encoder with its head.
        checkpoint: the file of the run's end.
        metrics: the last value of everything that was logged, such as "loss" and "knn_top1".
    """

    model: InstanceDiscrimination
    checkpoint: Path
    metrics: dict[str, float]

    @property
    def backbone(self) -> nn.Module:
        """The trained encoder without its head, whose weights are the model's: images
        (N, 3, H, W), normalised by ImageNet's mean and deviation, -> features (N, D)."""
        return pooled(self.model.encoder_q)


def pretrain(
    data: str | PathLike,
    backbone: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    **flags: Any,
) -> Pretrained:
    """Pretrain as `pretrain/main.py` does, with its flags as keyword arguments.

        pretrain("DATA", recipe="configs/pretrain/moco_v2_r50.yaml", output="output/moco")
        pretrain("DATA", timm.create_model("vit_tiny_patch16_224", num_classes=0), batch_size=64)

    Under torchrun, and within a process group, each process calls it, and is one of the run's.

    Args:
        data: DATA of the command: a folder of images, or tar shards.
        backbone: images (N, 3, H, W) -> features (N, C), instead of `arch`; it gets a head (`mlp`,
            `moco_dim`) and is trained itself, from the weights that it has, to be left in
            evaluation mode.
        device: the first GPU, where there is one, by default.
        flags: those of `main.py`, with underscores and without those of the launch;
            `help(pretrain)` lists them with their defaults.

    Raises:
        UserError: whatever the command would say in one line.
        SystemExit: SIGTERM or Ctrl-C came, and a checkpoint was saved.
    """
    args = parse_keywords(data, flags)
    if backbone is not None:
        check_backbone(args, backbone, flags)
    run = partial(train, backbone=backbone)
    if device is None and not dist.is_initialized():
        pretrained = start(run, args)
    else:
        gpu = torch.cuda.is_available()
        here = torch.device("cuda", torch.cuda.current_device()) if gpu else "cpu"
        pretrained = run(args, usable_device(device or here))
    group_batchnorm(pretrained.model, 1).eval()  # what is done with it next has batches of its own
    return pretrained


_flags = [
    Parameter(n, Parameter.KEYWORD_ONLY, default=v) for n, v in pretraining_keywords().items()
]
_own = [p for p in signature(pretrain).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
pretrain.__signature__ = signature(pretrain).replace(parameters=[*_own, *_flags])


def usable_device(device: torch.device | str) -> torch.device:
    """Raises UserError for one that is not there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device} cannot be used: {one_line(error, 150)}") from error


def check_backbone(args: argparse.Namespace, backbone: nn.Module, given: dict[str, Any]) -> None:
    """Have the run named after the backbone. Raises UserError for one that cannot be trained, or
    flags that belong to the networks of --arch."""
    if given.get("arch") or args.small_stem:
        name = "arch" if given.get("arch") else "small_stem"
        raise UserError(f"{name} is for networks that are known by a name: drop it, or backbone")
    for size in [args.image_size] + [args.small_size] * bool(args.multi_crop):
        dry_run(backbone, size)
    args.arch = args.backbone = f"{type(backbone).__module__}.{type(backbone).__qualname__}"


def train(
    args: argparse.Namespace, device: torch.device, backbone: nn.Module | None = None
) -> Pretrained:
    """From images to a checkpoint, on `device`; one of the run's processes."""
    allow_pixels(args.max_image_pixels)
    on_main(check_packages, args.log)
    output = Path(args.output)
    claim = checkpoints.claimed_output(output, args.resume, args.overwrite)
    with StopRequest() as stop, claim:
        checkpoint = checkpoints.find(args.resume, output)
        if checkpoint and args.restart_epoch:
            checkpoint = checkpoints.restart_epoch(checkpoint)
        seed = seed_run(args.seed, checkpoint, args.deterministic)
        args.amp = settle_precision(args.amp, device, checkpoint)
        source = build_source(args, device, seed)
        model = build_model(args, source.samples, backbone)
        strided = getattr(model.encoder_q, "strided", True)
        layout = torch.channels_last if strided else torch.contiguous_format
        model = model.to(device, memory_format=layout)
        task = build_task(args, model, source, seed)
        if checkpoint:
            check_method(args, checkpoint)
            checkpoints.load_model(model, checkpoint, args.arch)
        describe(args, source, model, device, seed)
        settings = run_settings(args, seed)
        trainer = Trainer(task, settings, stop, checkpoint, args.iterations, Doctor(output))
        trainer.train()
    return Pretrained(model, output / checkpoints.LAST, trainer.last_values)


def build_source(
    args: argparse.Namespace, device: torch.device, seed: int
) -> FolderSource | ShardSource:
    """Where views come from. Raises UserError for data that cannot fill a batch."""
    on_device = args.augment_on == "device" or (args.augment_on == "auto" and device.type != "cpu")
    crops = build_crops(args, MoCoCrop if on_device else MoCoAugmentation)
    batches = loading(args, device, seed)
    if is_shards(args.data):
        samples = args.samples_per_epoch or args.iterations * args.batch_size
        shards = find_shards(args.data)
        return ShardSource(shards, crops, batches, samples, args.shuffle_buffer)
    data = Path(args.data)
    if args.list:
        return FolderSource(data, crops, batches, Path(args.list))
    return FolderSource(training_folder(data), crops, batches)


def build_crops(args: argparse.Namespace, augmentation: type[MoCoAugmentation]) -> MultiCrop:
    """The views of an image: the query's, the key's where there is one, and small ones.

    The key's view has the standard look: AutoAugment is for its positives.
    """
    colours = args.aug_plus, args.color_strength
    strong = STRONG[args.strong_aug]
    key = query = augmentation(args.image_size, *colours, args.crop_min)
    if strong:
        query = augmentation(args.image_size, *colours, args.crop_min, strong=strong)
    views = [query, key][: MECHANISMS[args.mechanism].num_views]
    if args.multi_crop:
        small = augmentation(args.small_size, *colours, *args.small_scale, strong)
        views += [small] * args.multi_crop
    return MultiCrop(views, args.constrained, (args.min_iou, args.max_iou))


def build_model(
    args: argparse.Namespace, samples: int, backbone: nn.Module | None = None
) -> InstanceDiscrimination:
    """The mechanism for a data set of `samples` images, on `backbone` or else --arch. Raises
    UserError for a batch that cannot be split, or is all of the data that a memory bank draws
    from."""
    if backbone is None:
        encoder = build_encoder(args.arch, args.moco_dim, args.mlp, args.small_stem)
    else:
        encoder = add_head(backbone, args.moco_dim, args.mlp, args.image_size)
    bank = args.mechanism == "memory-bank"
    # The bank's keys are not encoded, and a network without BN has nothing to leak.
    shuffled = args.shuffle_bn and not bank and bool(batchnorms(encoder))
    groups = choose_bn_groups(args.batch_size, world_size(), args.bn_groups, shuffled)
    if bank and samples <= args.batch_size:
        raise UserError(
            f"--mechanism memory-bank draws negatives from the images beside the batch: {samples} "
            f"images leave none to a batch of {args.batch_size}; pass a smaller --batch-size"
        )
    return build_mechanism(
        args.mechanism,
        encoder,
        dim=args.moco_dim,
        negatives=args.moco_k,
        samples=samples,
        key_momentum=args.moco_m,
        bank_momentum=args.bank_momentum,
        temperature=args.moco_t,
        bn_groups=groups,
        shuffle_bn=shuffled,
        neighbours=args.nearest_neighbours,
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
    knn = None
    data = Path(args.data)
    if args.knn_every and KnnMonitor.applies_to(data):
        workers = workers_per_process(args.workers)
        try:
            knn = KnnMonitor(
                data, args.image_size, workers, device, bank_size=args.knn_bank, seed=seed
            )
        except UserError as error:  # on every process alike; it must not stop a run
            print_on_main(f"warning: no kNN monitor: {error}")
    return MoCoPretraining(
        model,
        LOSSES[args.loss]().to(device),
        optimizer,
        source,
        seed,
        AMP_DTYPES[args.amp],
        monitor=knn.top1 if knn else None,
        draw_neighbours=knn.draw_neighbours if knn else None,
        knn_every=args.knn_every,
        keep=args.keep,
        save_every=args.save_every,
        compilation=args.compile,
        auxiliary_weight=args.nn_weight,
        auxiliary_from=args.nn_from_epoch * source.steps_per_epoch,
        conditions=source.conditions,
    )


def check_method(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError where the checkpoint is that of another mechanism, loss or optimizer, or
    where one of the two runs has a queue for neighbours, and the other has not."""
    config = checkpoint.state.get("config", {})  # the official code writes none
    for flag, official in (("mechanism", "moco"), ("loss", "infonce"), ("optimizer", "sgd")):
        before = config.get(flag, official)
        if before != getattr(args, flag):
            raise UserError(
                f"{checkpoint.path} was trained with --{flag} {before}; resume it with that"
            )
    held = "queue_backbone" in checkpoints.weights(checkpoint.state)
    if held != bool(args.nearest_neighbours):
        way = "with" if held else "without"
        raise UserError(
            f"{checkpoint.path} was trained {way} --nearest-neighbours; resume it {way} that"
        )


def describe(args, source, model: InstanceDiscrimination, device: torch.device, seed: int) -> None:
    """The first lines of a run."""
    groups, processes = model.bn_groups, world_size()
    print_on_main(
        f"{source.describe()}, {source.steps_per_epoch} steps an epoch; "
        f"global batch {args.batch_size} = {processes} process(es) x {groups} BN group(s) "
        f"x {args.batch_size // processes // groups}; {device}, seed {seed}, output {args.output}"
    )
    print_on_main(method_words(args, model))
    if args.knn_every and not KnnMonitor.applies_to(Path(args.data)):
        print_on_main(f"no kNN monitor: {args.data} lacks class folders in train/ and val/")


def method_words(args: argparse.Namespace, model: InstanceDiscrimination) -> str:
    """Where keys come from, and what their positives are."""
    words = [args.mechanism, args.loss]
    words.append(f"{'with' if model.shuffle_bn else 'without'} shuffled BN")
    if args.multi_crop:
        words.append(f"{args.multi_crop} small crops of {args.small_size} px")
    if args.constrained:
        words.append(f"at least {args.constrained:.0%} of each within the key's")
    if (args.min_iou, args.max_iou) != (0, 1):
        words.append(f"large crops with an IoU of {args.min_iou:g} to {args.max_iou:g}")
    if args.strong_aug != "none":
        also = {"mix": "also by AutoAugment", "autoaugment": "by AutoAugment"}[args.strong_aug]
        words.append(f"positives augmented {also}")
    if args.nearest_neighbours:
        late = f" after {args.nn_from_epoch} epochs" if args.nn_from_epoch else ""
        weight = f"of weight {args.nn_weight:g}{late}"
        words.append(f"{args.nearest_neighbours} nearest neighbours {weight}")
    return ", ".join(words)
