"""Which images make which batch, and their loading.

    records -> stream of keys -> this process's batches of keys -> mapped by workers -> model inputs

Everything here is a function of the seed and of the position in one infinite stream of samples, so
a run resumed at iteration t sees exactly what the uninterrupted run would have seen, with any
number of loading workers.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco_det.common.ending import prepare_end
from moco_det.common.errors import UserError
from moco_det.common.images import allow_pixels, max_pixels
from moco_det.common.processes import ignore_stop_signals, print_on_main, rank, world_size
from moco_det.config.checks import BatchPlan, is_depth, is_per_pixel, wanted_of
from moco_det.datasets import NOTHING, Problems, Wanted, get_dataset
from moco_det.datasets.dataset import check_images, learnable
from moco_det.datasets.sharing import PackedList, shared_list
from moco_det.densepose.points import KEYS as DENSEPOSE_KEYS
from moco_det.native.data.mapper import (
    DatasetMapper,
    DepthDatasetMapper,
    SemanticDatasetMapper,
    build_test_mapper,
    build_train_mapper,
)

Key = tuple[int, int]  # (position in the stream, index of the record)

# -- records --------------------------------------------------------------------------------------


def all_records(names: Sequence[str], wanted: Wanted = NOTHING) -> list[dict]:
    """Of the data sets `names`, at least one; UserError where there is none, or no image of it."""
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name the data sets to train on")
    records = []
    for name in names:
        found = get_dataset(name).records(wanted=wanted)
        check_images(found, Problems())
        records += found
    return records


def training_records(
    names: Sequence[str],
    filter_empty: bool,
    with_masks: bool = False,
    with_keypoints: bool = False,
    min_keypoints: int = 0,
    with_densepose: bool = False,
    wanted: Wanted = NOTHING,
) -> list[dict]:
    """The records of all data sets.

    Args:
        names: of the data sets.
        filter_empty: leave out the images that hold nothing but crowds.
        with_masks, with_keypoints: keep these annotations; they take far more memory than boxes.
        min_keypoints: leave out the images with fewer labelled keypoints.
        with_densepose: keep dense pose, and leave out the images without any.
        wanted: what every object must have.

    Raises:
        UserError: nothing is left.
    """
    records = all_records(names, wanted)
    used = learnable(records, names, filter_empty, min_keypoints, with_densepose)
    boxes = sum(len(record["annotations"]) for record in used)
    left_out = len(records) - len(used)
    print_on_main(f"training on {len(used)} images, {boxes} boxes ({left_out} images left out)")
    kept = {"segmentation": with_masks, "keypoints": with_keypoints}
    kept |= dict.fromkeys((*DENSEPOSE_KEYS, "dp_masks"), with_densepose)
    for annotation in (a for record in used for a in record["annotations"]):
        for field in (name for name, keep in kept.items() if not keep):
            annotation.pop(field, None)
    return used


def build_training_records(cfg) -> list[dict]:
    if is_per_pixel(cfg):
        records = all_records(cfg.DATASETS.TRAIN)
        what = "depth" if is_depth(cfg) else "label"
        print_on_main(f"training on {len(records)} images with {what} maps")
        return records
    model = cfg.MODEL
    return training_records(
        cfg.DATASETS.TRAIN,
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        with_masks=model.MASK_ON,
        with_keypoints=model.KEYPOINT_ON,
        min_keypoints=model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if model.KEYPOINT_ON else 0,
        with_densepose=model.DENSEPOSE_ON,
        wanted=wanted_of(cfg),
    )


def shared_training_records(cfg) -> PackedList:
    """`build_training_records`, made once on each machine. Collective.

    COCO's take 3 GB as Python objects, and a seventh of it packed.
    """
    return shared_list(lambda: packed(cfg, build_training_records(cfg)))


def packed(cfg, records: Sequence[dict]) -> PackedList:
    """With what must be known of all records before the first is loaded; see `Notes`."""
    if isinstance(records, PackedList):
        return records
    wide = factors = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [record["width"] > record["height"] for record in records]
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        loader = cfg.DATALOADER
        factors = repeat_factors(records, loader.REPEAT_THRESHOLD, loader.REPEAT_SQRT)
    return PackedList.of(records, Notes(wide, factors))


class Notes(NamedTuple):
    """Of training records, where the config asks for it.

    Args:
        wide: per record, whether it is wider than tall.
        factors: of `repeat_factors`.
    """

    wide: list[bool] | None
    factors: torch.Tensor | None


# -- streams of samples ---------------------------------------------------------------------------


def training_stream(size: int, seed: int) -> Iterator[Key]:
    """Endless shuffles of `range(size)`: what Detectron2's `TrainingSampler(size, seed)` yields."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in count():
        permutation = torch.randperm(size, generator=generator).tolist()
        yield from enumerate(permutation, start=epoch * size)


def repeating_stream(factors: torch.Tensor, seed: int) -> Iterator[Key]:
    """Endless shuffles in which record i comes `factors[i]` times, in the mean over the shuffles.

    What Detectron2's `RepeatFactorTrainingSampler(factors, seed=seed)` yields: in each shuffle the
    fraction of a factor is rounded up with the probability that it is.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = factors.trunc()
    fraction = factors - whole
    start = 0
    while True:
        times = whole + (torch.rand(len(factors), generator=generator) < fraction)
        indices = torch.arange(len(factors)).repeat_interleave(times.long())
        order = torch.randperm(len(indices), generator=generator)
        yield from enumerate(indices[order].tolist(), start)
        start += len(indices)


def repeat_factors(records: list[dict], threshold: float, sqrt: bool) -> torch.Tensor:
    """How often to show each record in an epoch, (len(records),) float32, at least 1.

    A class in the share f of the images has the factor max(1, sqrt(threshold / f)), without the
    root where `sqrt` is False; a record has the greatest factor of its classes, crowds included
    (Detectron2; LVIS paper, appendix B.2).
    """
    classes = [{a["category_id"] for a in record["annotations"]} for record in records]
    images = Counter(label for labels in classes for label in labels)
    ratio = {label: threshold / (n / len(records)) for label, n in images.items()}
    factor = {label: max(1.0, math.sqrt(r) if sqrt else r) for label, r in ratio.items()}
    factors = [max((factor[label] for label in labels), default=1.0) for labels in classes]
    return torch.tensor(factors, dtype=torch.float32)


def build_stream(cfg, records: Sequence[dict], seed: int) -> Iterator[Key]:
    """The endless stream of samples that DATALOADER.SAMPLER_TRAIN names."""
    factors = packed(cfg, records).notes.factors
    if factors is not None:
        return repeating_stream(factors, seed)
    return training_stream(len(records), seed)


# -- batches --------------------------------------------------------------------------------------


def batches_by_aspect(
    keys: Iterable[Key], wide: list[bool] | None, batch_size: int
) -> Iterator[list[Key]]:
    """Batches of only wide or only tall images; each is issued as soon as it is full.

    `wide[index]` says on which side a record is; None: all are on one. Detectron2's
    `AspectRatioGroupedDataset`, on keys instead of decoded images.
    """
    groups: dict[bool, list[Key]] = {False: [], True: []}
    for key in keys:
        group = groups[wide is not None and wide[key[1]]]
        group.append(key)
        if len(group) == batch_size:
            yield group.copy()
            group.clear()


def training_batches(
    stream: Iterable[Key],
    batch_size: int,
    wide: list[bool] | None = None,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Key]]:
    """One process's batches of keys, without end.

    Args:
        stream: keys of all processes' samples, dealt out to the processes one by one.
        batch_size: images of one batch of this process.
        wide: per record, whether it is wider than tall; None: batches are not grouped by aspect.
        start: number of batches to leave out, those a resumed run has already seen.
        rank, world_size: which process this is, of how many.
    """
    keys = islice(stream, rank, None, world_size)
    return islice(batches_by_aspect(keys, wide, batch_size), start, None)


# -- loading --------------------------------------------------------------------------------------


class MappedRecords(Dataset):
    """Records through a `DatasetMapper`; the draws of a sample come from (seed, position) alone.

    The records are packed: worker processes share them with their parent.

    A `UserError` is handed over as an item, because a `DataLoader` would bury it in a traceback.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: DatasetMapper | SemanticDatasetMapper | DepthDatasetMapper,
        seed: int = 0,
    ):
        self.records = records if isinstance(records, PackedList) else PackedList.of(records)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> dict | UserError:
        position, index = key
        try:
            return self.mapper(self.records[index], np.random.default_rng((self.seed, position)))
        except UserError as error:
            return error


def load(records: MappedRecords, batches, num_workers: int, pin_memory: bool) -> Iterator[list]:
    """Lists of model inputs for `batches`, an iterable of lists of keys. A generator, to be closed.

    Raises:
        UserError: an image could not be read.
    """
    prepare_end()
    loader = DataLoader(
        records,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=partial(_prepare_worker, pixels=max_pixels()),
        pin_memory=pin_memory,
    )
    for batch in loader:
        for item in batch:
            if isinstance(item, UserError):
                raise item
        yield batch


def _prepare_worker(worker: int, pixels: float) -> None:
    """The limit of images holds also where a worker is not forked."""
    allow_pixels(pixels)
    ignore_stop_signals()


# -- from a config --------------------------------------------------------------------------------


def build_train_loader(
    cfg,
    plan: BatchPlan,
    records: Sequence[dict],
    seed: int,
    start: int = 0,
    num_workers: int | None = None,
) -> Iterator[list[dict]]:
    """This process's batches of one forward pass each, from iteration `start` on, without end.

    `num_workers`: other than DATALOADER.NUM_WORKERS.
    """
    records = packed(cfg, records)
    batches = training_batches(
        build_stream(cfg, records, seed),
        plan.images_per_forward,
        records.notes.wide,
        start * plan.accumulation,
        rank(),
        plan.processes,
    )
    mapped = MappedRecords(records, build_train_mapper(cfg), seed)
    workers = cfg.DATALOADER.NUM_WORKERS if num_workers is None else num_workers
    return load(mapped, batches, workers, pin_memory=cfg.MODEL.DEVICE != "cpu")


def build_test_loader(cfg, records: Sequence[dict]) -> Iterator[list[dict]]:
    """This process's share of the records, in order, one image a batch.

    One at a time as Detectron2 does: padding to a neighbour's size would change the numbers.
    """
    bounds = np.linspace(0, len(records), world_size() + 1).astype(int)
    share = range(*bounds[rank() : rank() + 2])
    mapped = MappedRecords(list(map(without_annotations, records)), build_test_mapper(cfg))
    batches = [[(index, index)] for index in share]
    return load(mapped, batches, cfg.DATALOADER.NUM_WORKERS, pin_memory=cfg.MODEL.DEVICE != "cpu")


def without_annotations(record: dict) -> dict:
    """What inference needs: they may be far larger than the rest."""
    return {name: value for name, value in record.items() if name != "annotations"}
