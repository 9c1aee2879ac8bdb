"""Which images make which batch, and their loading.

Everything here is a function of the seed and of the position in one infinite stream of samples, so
a run resumed at iteration t sees exactly what the uninterrupted run would have seen, whatever the
number of loading workers.
"""

import pickle
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco_det.datasets import get_dataset
from moco_det.errors import UserError
from moco_det.native import comm
from moco_det.native.mapper import Mapper, build_test_mapper, build_train_mapper

Key = tuple[int, int]  # (position in the stream, index of the record)


def training_stream(size: int, seed: int) -> Iterator[Key]:
    """Endless shuffles of `range(size)`: what Detectron2's `TrainingSampler(size, seed)` yields."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in count():
        permutation = torch.randperm(size, generator=generator).tolist()
        yield from enumerate(permutation, start=epoch * size)


def batches_by_aspect(
    keys: Iterable[Key], wide: list[bool], batch_size: int
) -> Iterator[list[Key]]:
    """Batches of only wide or only tall images; each is issued as soon as it is full.

    `wide[index]` says on which side a record is. Detectron2's `AspectRatioGroupedDataset`, on keys
    instead of decoded images.
    """
    groups: dict[bool, list[Key]] = {False: [], True: []}
    for key in keys:
        group = groups[wide[key[1]]]
        group.append(key)
        if len(group) == batch_size:
            yield group.copy()
            group.clear()


def batches_in_order(keys: Iterator[Key], batch_size: int) -> Iterator[list[Key]]:
    while batch := list(islice(keys, batch_size)):
        yield batch


def training_batches(
    size: int,
    seed: int,
    batch_size: int,
    wide: list[bool] | None = None,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Key]]:
    """One process's batches of keys, without end.

    Args:
        size: number of records.
        seed: of the shuffles.
        batch_size: images of one batch of this process.
        wide: per record, whether it is wider than tall; None: batches are not grouped by aspect.
        start: number of batches to leave out, those a resumed run has already seen.
        rank, world_size: the stream is dealt out to the processes sample by sample.
    """
    keys = islice(training_stream(size, seed), rank, None, world_size)
    if wide is None:
        batches = batches_in_order(keys, batch_size)
    else:
        batches = batches_by_aspect(keys, wide, batch_size)
    return islice(batches, start, None)


class MappedRecords(Dataset):
    """Records through a `Mapper`; the draws of a sample come from (seed, position) alone.

    The records are held as bytes: worker processes share those with their parent, whereas touching
    a Python object writes its reference count, and so copies its memory to every worker in time.

    A `UserError` is handed over as an item, because a `DataLoader` would bury it in a traceback.
    """

    def __init__(self, records: list[dict], mapper: Mapper, seed: int = 0):
        pickled = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in records]
        self.ends = np.cumsum([0] + [len(record) for record in pickled])
        self.pickled = b"".join(pickled)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, key: Key) -> dict | UserError:
        position, index = key
        record = pickle.loads(self.pickled[self.ends[index] : self.ends[index + 1]])
        try:
            return self.mapper(record, np.random.default_rng((self.seed, position)))
        except UserError as error:
            return error


def load(records: MappedRecords, batches, num_workers: int, pin_memory: bool) -> Iterator[list]:
    """Lists of model inputs for `batches`, an iterable of lists of keys. A generator, to be closed.

    Raises:
        UserError: an image could not be read.
    """
    loader = DataLoader(
        records,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_ignore_sigterm,
        pin_memory=pin_memory,
    )
    for batch in loader:
        for item in batch:
            if isinstance(item, UserError):
                raise item
        yield batch


def _as_list(items: list) -> list:
    return items


def _ignore_sigterm(worker: int) -> None:
    """SIGTERM to all processes of a run must not take the images from its last iteration.

    Nor does it end a worker when Python exits, which is why the generator that owns it is closed.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_records(names: Sequence[str], filter_empty: bool) -> list[dict]:
    """The records of all data sets, optionally without those that hold nothing but crowds.

    Raises:
        UserError: nothing is left.
    """
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name the data sets to train on")
    records = [record for name in names for record in get_dataset(name).records()]
    used = records
    if filter_empty:
        used = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    boxes = sum(len(record["annotations"]) for record in used)
    left_out = len(records) - len(used)
    comm.say(f"training on {len(used)} images, {boxes} boxes ({left_out} images have none)")
    if not used:
        raise UserError(
            f"DATASETS.TRAIN {tuple(names)} holds no annotated image: check its split and "
            "annotations, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    return used


def build_train_loader(
    cfg, records: list[dict], seed: int, start: int = 0, num_workers: int | None = None
) -> Iterator[list[dict]]:
    """This process's training batches from iteration `start` on, without end.

    `num_workers`: other than DATALOADER.NUM_WORKERS.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    total, processes = cfg.SOLVER.IMS_PER_BATCH, comm.world_size()
    if total < 1 or total % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {total} is the batch of all {processes} processes together: "
            f"set it to a multiple of {processes}"
        )
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [record["width"] > record["height"] for record in records]
    batches = training_batches(
        len(records), seed, total // processes, wide, start, comm.rank(), processes
    )
    mapped = MappedRecords(records, build_train_mapper(cfg), seed)
    workers = cfg.DATALOADER.NUM_WORKERS if num_workers is None else num_workers
    return load(mapped, batches, workers, pin_memory=cfg.MODEL.DEVICE != "cpu")


def build_test_loader(cfg, records: list[dict]) -> Iterator[list[dict]]:
    """This process's share of the records, in order, one image a batch.

    One at a time as Detectron2 does: padding to a neighbour's size would change the numbers.
    """
    bounds = np.linspace(0, len(records), comm.world_size() + 1).astype(int)
    share = range(*bounds[comm.rank() : comm.rank() + 2])
    mapped = MappedRecords(records, build_test_mapper(cfg))
    batches = [[(index, index)] for index in share]
    return load(mapped, batches, cfg.DATALOADER.NUM_WORKERS, pin_memory=cfg.MODEL.DEVICE != "cpu")
