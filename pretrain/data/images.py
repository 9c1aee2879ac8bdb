"""Image files to batches of views, the same on any number of processes and workers."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from moco_det.common.ending import prepare_end
from moco_det.common.errors import UserError, one_line
from moco_det.common.images import (
    REDUCTIONS,
    EncodedImage,
    UnreadableImage,
    allow_pixels,
    check_image,
    max_pixels,
    read_bytes,
)
from moco_det.common.processes import ignore_stop_signals, rank, world_size
from pretrain.data.augmentations import CroppedView, MoCoAugmentation
from pretrain.data.listing import (
    check_unchanged,
    find_images,
    fingerprint,
    read_list,
    seen_alike,
)
from pretrain.data.multi_crop import MultiCrop

Views = list[np.ndarray] | list[CroppedView]  # of one image
ViewTensors = list[torch.Tensor] | list[CroppedView]  # of a batch of images

# So many unreadable images one after another are no accident: the run ends.
UNREADABLE_IN_A_ROW = 100


def training_folder(data: Path) -> Path:
    """DATA/train of an ImageFolder root, else DATA itself."""
    return data / "train" if (data / "train").is_dir() else data


class UnreadableImages:
    """The images of a data set that could not be read: each is named, too many end the run.

    Args:
        total: images of the data set.
        tolerated: share of them that may be unreadable.
        left_out: whether they are left out, which the warnings then say, or replaced.
    """

    def __init__(self, total: int, tolerated: float, left_out: bool = False):
        self.total = total
        self.tolerated = tolerated
        self.left_out = left_out
        self.names: set[str] = set()

    def add(self, names: Iterable[str], warn: bool = True, fatal: bool = False) -> None:
        """Raises UserError when there are too many, or they are `fatal`: nothing else was found."""
        for name in sorted(set(names) - self.names):
            self.names.add(name)
            which = ", left out" if self.left_out else f" {len(self.names)}"
            if warn:
                print(f"warning: unreadable image{which}: {name}", flush=True)
        if fatal or len(self.names) > self.tolerated * self.total:
            raise UserError(
                f"{len(self.names)} of {self.total} images are unreadable, more than "
                f"--max-unreadable {self.tolerated} allows; one of them: "
                f"{one_line(min(self.names), 190)}"
            )


class LoadedViews(NamedTuple):
    """What is made of an image; or, stacked, of a batch of N images.

    Args:
        views: one for each augmentation; none where nothing was readable.
        free_crops: whether each view's crop is a free one, see `MultiCrop.draw`; V, or N x V.
        unreadable: messages on images that were passed over.
    """

    views: Views | ViewTensors
    free_crops: list[bool] | torch.Tensor
    unreadable: list[str]


def make_views(
    encoded: EncodedImage, crops: MultiCrop, rng: np.random.Generator
) -> tuple[Views, list[bool]]:
    """A view of each augmentation, and which of their crops are free ones; the image is decoded
    once, no larger than they need it.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    image, reduction = None, 1
    if encoded.jpeg_size is None:
        image = encoded.decode()
    height, width = image.shape[:2] if encoded.jpeg_size is None else encoded.jpeg_size
    drawn, free = crops.draw(height, width, rng)
    if image is None:
        surplus = min(map(MoCoAugmentation.surplus, crops.augmentations, drawn))
        reduction = max(r for r in REDUCTIONS if r <= max(1, surplus))
        image = encoded.decode(reduction)
    views = [
        augment.view(image, view, reduction)
        for augment, view in zip(crops.augmentations, drawn, strict=True)
    ]
    return views, free


class ImageViews(Dataset):
    """(epoch, index) -> views of image `index`, all that `crops` draws; it is decoded once.

    The draws are a function of (seed, epoch, index) alone. An unreadable image is replaced by the
    next readable one, so that the replacement, too, does not depend on who loads it.

    Args:
        paths: of `find_images`, relative to `folder`.
        crops: draws the views; their sizes may differ.
    """

    def __init__(self, folder: Path, paths: np.ndarray, crops: MultiCrop, seed: int):
        self.folder = os.fsencode(folder)
        self.paths = paths
        self.crops = crops
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> LoadedViews:
        epoch, index = key
        unreadable = []
        for offset in range(len(self.paths)):
            place = (index + offset) % len(self.paths)
            path = os.fsdecode(os.path.join(self.folder, self.paths[place]))
            rng = np.random.default_rng((self.seed, epoch, index))
            try:
                made = make_views(check_image(read_bytes(path), path), self.crops, rng)
            except UnreadableImage as error:
                unreadable.append(f"{error.name}: {error.reason}")
                if len(unreadable) == UNREADABLE_IN_A_ROW:
                    break
                continue
            return LoadedViews(*made, unreadable)
        return LoadedViews([], [], unreadable)


def collate_views(samples: list[LoadedViews]) -> LoadedViews:
    """Stack N samples of V views to V tensors (N, S, S, 3), and join their messages.

    No tensors if a sample has no views. NHWC uint8 is a quarter of the floats' traffic, and its
    NCHW view is channels_last for nothing.
    """
    unreadable = [message for sample in samples for message in sample.unreadable]
    if not all(sample.views for sample in samples):
        return LoadedViews([], torch.empty(0), unreadable)
    by_view = zip(*(sample.views for sample in samples), strict=True)
    free = torch.tensor([sample.free_crops for sample in samples])
    return LoadedViews([_stack(view) for view in by_view], free, unreadable)


def _stack(views: Sequence[np.ndarray] | Sequence[CroppedView]) -> torch.Tensor | CroppedView:
    if isinstance(views[0], CroppedView):
        return CroppedView(*map(_stack, zip(*views, strict=True)))
    return torch.from_numpy(np.stack(views))


class DistributedBatchSampler(Sampler):
    """This process's slice of every global batch of an epoch, as lists of (epoch, index).

    The epoch's order is a function of (seed, epoch). Global batch t is its slice [tB, (t+1)B);
    of that, process r of W takes the r-th of W equal parts. The last, incomplete batch is dropped.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.samples = samples
        self.batch_size = batch_size
        local = batch_size // world_size
        self.steps_per_epoch = samples // batch_size
        self.mine = slice(rank * local, (rank + 1) * local)
        self.seed = seed
        self.start(0)

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration begins at batch `step` of `epoch`."""
        self.epoch = epoch
        self.first_step = step
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)

    def global_batch(self, step: int) -> np.ndarray:
        """The indices of batch `step` of the epoch, those of all processes."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self):
        for step in range(self.first_step, self.steps_per_epoch):
            yield [(self.epoch, int(i)) for i in self.global_batch(step)[self.mine]]


class ViewBatch(NamedTuple):
    """What pretraining trains on in a step.

    Args:
        views: of this process's images, uint8 RGB, N x S x S x 3 each; crops without their looks,
            which `batched_augmentations.finished` gives them, where the augmentations are MoCoCrop.
            The query's, the key's, then those of small crops.
        indices: where the images of the global batch are in the data set, B.
        free_crops: whether the crop of each of the V views is a free one, see `MultiCrop.draw`;
            N x V, bool.
    """

    views: ViewTensors
    indices: torch.Tensor
    free_crops: torch.Tensor


@dataclass(frozen=True)
class Loading:
    """How the batches of a run are made.

    Args:
        batch_size: global.
        seed: of order and augmentation.
        workers: loading processes of this process.
        max_unreadable: share of the images that may be.
    """

    batch_size: int
    seed: int
    workers: int
    pin_memory: bool
    max_unreadable: float


class SampledBatches:
    """Batches of a data set that takes (epoch, index), each of its samples once an epoch.

    `options` are those of the DataLoader.
    """

    def __init__(self, dataset: Dataset, loading: Loading, **options):
        self.samples = len(dataset)
        self.seed = loading.seed
        self.sampler = DistributedBatchSampler(
            self.samples, loading.batch_size, rank(), world_size(), self.seed
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.loader = build_loader(
            dataset, loading.workers, loading.pin_memory, batch_sampler=self.sampler, **options
        )

    def start(self, epoch: int, step: int) -> None:
        self.sampler.start(epoch, step)
        self.loader.generator.manual_seed(self.seed + epoch)  # the workers' seeds


class FolderSource(SampledBatches):
    """ViewBatches of all images below a folder, or those in a list.

    Raises UserError where they cannot fill one, or processes see different ones. Collective.

    Args:
        crops: draws the views of an image.
        listed: a file of `read_list`.
    """

    def __init__(
        self, folder: Path, crops: MultiCrop, loading: Loading, listed: Path | None = None
    ):
        find = partial(read_list, listed) if listed else find_images
        paths = seen_alike(partial(find, folder), fingerprint)
        self.listed = listed
        self.fingerprint = fingerprint(paths)
        self.conditions = crops.conditions
        dataset = ImageViews(folder, paths, crops, loading.seed)
        if len(dataset) < loading.batch_size:
            raise UserError(
                f"{len(dataset)} images {f'of {listed}' if listed else f'below {folder}'} are "
                "fewer than the global batch of "
                f"{loading.batch_size}; pass a smaller --batch-size"
            )
        super().__init__(dataset, loading, collate_fn=collate_views)
        self.unreadable = UnreadableImages(self.samples, loading.max_unreadable)

    def __iter__(self) -> Iterator[ViewBatch]:
        return map(self._batch, self.loader, itertools.count(self.sampler.first_step))

    def _batch(self, loaded: LoadedViews, step: int) -> ViewBatch:
        self.unreadable.add(loaded.unreadable, fatal=not loaded.views)
        indices = torch.from_numpy(self.sampler.global_batch(step))
        return ViewBatch(loaded.views, indices, loaded.free_crops)

    def state(self) -> dict:
        """Which images these are: all else is a function of seed, epoch and step."""
        return self.fingerprint

    def resume(self, state: dict, path: Path) -> None:
        """Raises UserError where the images are other ones."""
        check_unchanged(state, self.fingerprint, path)

    def describe(self) -> str:
        return f"{self.samples} images" + (f" of {self.listed}" if self.listed else "")


def build_loader(dataset: Dataset, workers: int, pin_memory: bool, **kwargs) -> DataLoader:
    """A DataLoader whose workers use one thread each; with a batch sampler they outlive epochs.

    It has a generator of its own, so that it takes no draw from the process's.
    """
    prepare_end()
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0 and "batch_sampler" in kwargs,
        worker_init_fn=partial(_prepare_worker, pixels=max_pixels()),
        generator=torch.Generator(),
        **kwargs,
    )


def _prepare_worker(worker: int, pixels: float) -> None:
    allow_pixels(pixels)  # where a worker is not forked
    cv2.setNumThreads(0)
    ignore_stop_signals()
