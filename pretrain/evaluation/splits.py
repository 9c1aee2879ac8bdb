"""Train and val of a labelled data set: images, or their features under a frozen backbone.

Shape legend:
    N: images of this process in a step     M: images of a split     D: pooled features
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.processes import print_on_main, rank, workers_per_process, world_size
from pretrain.data.images import DistributedBatchSampler, build_loader
from pretrain.data.labelled import (
    EvaluationView,
    LabelledImages,
    LabelledSplit,
    RandomCrops,
    find_parts,
)
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.evaluation.features import extract, extract_all, share_loader


class LabelledSplits:
    """Train in steps and val at once.

    Raises UserError where a part is missing, too small, or more than --max-unreadable corrupt.
    """

    def __init__(self, args, device: torch.device, seed: int):
        self.args = args
        self.device = device
        self.seed = seed
        self.classes, self.train, self.val = find_parts(Path(args.data))
        self.centre = EvaluationView(args.image_size)
        self.workers = workers_per_process(args.workers)
        self.dtype = AMP_DTYPES[args.amp]
        self.unreadable = {self.train.name: set(), self.val.name: set()}

    def validation(self, backbone: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Features M x D and labels M of val. Collective."""
        return self._table(self.val, backbone)

    def prepare_training(self, backbone: nn.Module | None) -> None:
        """Compute all features of train, where --cache-features asks for it.

        Args:
            backbone: the frozen one; None if the steps are to have images.
        """
        args = self.args
        self.backbone = backbone
        if args.cache_features:
            self.table = self._table(self.train, backbone)
            samples = len(self.table[1])
        else:
            images = RandomCrops(self.train, args.image_size, self.seed)
            samples = len(images)
        if samples < args.batch_size or args.batch_size % world_size():
            raise UserError(
                f"--batch-size {args.batch_size} must be a multiple of the {world_size()} "
                f"process(es) and at most the {samples} images of {self.train.name}"
            )
        self.batches = DistributedBatchSampler(
            samples, args.batch_size, rank(), world_size(), self.seed
        )
        if not args.cache_features:
            pin = self.device.type == "cuda"
            self.loader = build_loader(images, self.workers, pin, batch_sampler=self.batches)
        print_on_main(
            f"{samples} images of {len(self.classes)} classes, {self.batches.steps_per_epoch} "
            f"steps an epoch of batches of {args.batch_size}; {world_size()} process(es), "
            f"{self.device}, seed {self.seed}, output {args.output}"
        )

    def training(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Features N x D, or images N x S x S x 3 uint8 if there is no backbone; labels N, -1 if
        unreadable; and the seconds waited for images.

        From where `batches` was started to the end of its epoch.
        """
        if self.args.cache_features:
            for keys in self.batches:
                indices = torch.tensor([index for _, index in keys], device=self.device)
                yield *(part[indices] for part in self.table), 0.0
            return
        begun = time.perf_counter()
        for images, labels in self.loader:
            waited = time.perf_counter() - begun
            self._check_images(self.loader.dataset, labels, warn=True)
            images = images.to(self.device, non_blocking=True)
            if self.backbone is not None:
                images = extract(self.backbone, images, self.dtype)
            yield images, labels.clamp(min=-1).to(self.device), waited
            begun = time.perf_counter()

    def _table(self, part: LabelledSplit, backbone: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Features M x D and labels M of the readable images of a part. Collective."""
        dataset = LabelledImages(part, self.args.image_size, self.centre)
        print_on_main(f"features of {len(dataset)} images of {part.name}")
        loader = share_loader(dataset, self.workers, self.device)
        features, labels = extract_all(backbone, loader, self.device, self.dtype)
        self._check_images(dataset, labels, warn=rank() == 0)
        return features[labels >= 0], labels[labels >= 0]

    def _check_images(self, dataset: LabelledImages, labels: torch.Tensor, warn: bool) -> None:
        """Note the unreadable files among `labels`, and warn of each once."""
        indices = (-1 - labels[labels < 0]).tolist()
        files = {dataset.file(index) for index in indices}
        bad = self.unreadable[dataset.images.name]
        for file in sorted(files - bad) if warn else ():
            print(f"warning: unreadable image, left out: {file}", flush=True)
        bad |= files
        if len(bad) > self.args.max_unreadable * len(dataset):
            raise UserError(
                f"{len(bad)} of {len(dataset)} images are unreadable, more than --max-unreadable "
                f"{self.args.max_unreadable} allows; one of them: {min(bad)}"
            )
