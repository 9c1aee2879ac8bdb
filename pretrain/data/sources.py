"""Where the batches of a run come from: a folder of images, or tar shards.

A source has
    samples           images of an epoch
    steps_per_epoch
    start(epoch, step)  the next iteration begins at batch `step` of `epoch`
    iteration         this process's query views, key views or None, messages on unreadable images
    places(step)      where in the data set each image of the global batch `step` is, B
    state()           what a checkpoint needs beside epoch and step; collective
    resume(state, path)
    describe()        the data, for the first line of a run
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from moco_det.common.errors import UserError
from moco_det.common.processes import gather, print_on_main, rank, workers_per_process, world_size
from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.images import (
    DistributedBatchSampler,
    TwoViews,
    build_loader,
    collate_views,
    find_images,
    training_folder,
)
from pretrain.moco.mechanisms import MECHANISMS


def build_source(args, device: torch.device, seed: int):
    """The source of the flags `args`. Raises UserError for data that cannot fill a batch."""
    if is_shards(args.data):
        return ShardSource(args, device, seed)
    if args.samples_per_epoch:
        raise UserError("--samples-per-epoch belongs to tar shards: a folder's images are counted")
    return FolderSource(args, device, seed)


def is_shards(data: str) -> bool:
    """Whether DATA names tar files: by a pattern, a URL, or a command after `pipe:`."""
    if Path(data).is_dir():
        return False
    return bool(re.search(r"^pipe:|://|\.(tar|tgz)\b", data))


class FolderSource:
    """Every image of a folder once an epoch."""

    def __init__(self, args, device: torch.device, seed: int):
        folder = training_folder(Path(args.data))
        view = MoCoAugmentation(args.image_size, args.aug_plus, args.color_strength)
        keys = MECHANISMS[args.mechanism].view_count == 2
        dataset = TwoViews(folder, find_images(folder), view, seed, keys)
        self.samples = len(dataset)
        if self.samples < args.batch_size:
            raise UserError(
                f"{self.samples} images below {folder} are fewer than the global batch of "
                f"{args.batch_size}; pass a smaller --batch-size"
            )
        self.seed = seed
        self.batches = DistributedBatchSampler(
            self.samples, args.batch_size, rank(), world_size(), seed
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.loader = build_loader(
            dataset,
            workers_per_process(args.workers),
            device.type == "cuda",
            batch_sampler=self.batches,
            collate_fn=collate_views,
        )

    def start(self, epoch: int, step: int) -> None:
        self.batches.start(epoch, step)
        self.loader.generator.manual_seed(self.seed + epoch)  # the workers' seeds

    def __iter__(self) -> Iterator:
        return iter(self.loader)

    def places(self, step: int) -> torch.Tensor:
        return torch.from_numpy(self.batches.global_batch(step))

    def state(self) -> dict:
        """Nothing: all is a function of seed, epoch and step."""
        return {}

    def resume(self, state: dict, path: Path) -> None:
        pass

    def describe(self) -> str:
        return f"{self.samples} images"


class ShardSource:
    """Tar shards, read without end; shards.py says how, and what is promised.

    An epoch is `--samples-per-epoch`, else the whole run of `--iterations`.
    """

    def __init__(self, args, device: torch.device, seed: int):
        if args.mechanism == "memory-bank":
            raise UserError(
                "--mechanism memory-bank keeps a feature for every place in a folder; the samples "
                "of tar shards have no such places: pass a folder of images as DATA"
            )
        self.args = args
        self.seed = seed
        self.samples, self.steps_per_epoch = epoch_length(args)
        self.shards = find_shards(args.data)
        workers = workers_per_process(args.workers)
        counts = gather(torch.tensor([max(1, workers)], device=device)).tolist()
        if len(self.shards) < sum(counts):
            raise UserError(
                f"{len(self.shards)} shards cannot feed {sum(counts)} workers, those of "
                f"{world_size()} process(es): pass a smaller -j, or write more shards"
            )
        self.layout = {
            "shards": len(self.shards),
            "workers": counts,
            "seed": seed,
            "shuffle_buffer": args.shuffle_buffer,
        }
        self.positions = [(0, 0)] * counts[rank()]
        self.turn = 0
        self.workers, self.pin = workers, device.type == "cuda"
        self.loading = None

    def start(self, epoch: int, step: int) -> None:
        """Nothing: the next batch is always the one that follows the last one."""

    def __iter__(self) -> Iterator:
        # Not kept in a generator of its own: it would hold this object that holds it, and the
        # workers, which ignore SIGTERM, would not hear of the end of the run.
        if self.loading is None:
            loader = build_loader(self._streams(), self.workers, self.pin, batch_size=None)
            self.loading = iter(loader)
        for batch in self.loading:
            if batch is None:
                continue
            if batch.broken:
                raise UserError(batch.broken)
            self.positions[self.turn] = tuple(batch.position)
            self.turn = (self.turn + 1) % len(self.positions)
            yield batch.query, batch.key, batch.unreadable

    def _streams(self):
        from pretrain.data.shards import Position, ShardStreams

        args, counts = self.args, self.layout["workers"]
        return ShardStreams(
            self.shards,
            sum(counts[: rank()]),
            sum(counts),
            [Position(*position) for position in self.positions],
            self.turn,
            args.batch_size // world_size(),
            MoCoAugmentation(args.image_size, args.aug_plus, args.color_strength),
            self.seed,
            args.shuffle_buffer,
        )

    def places(self, step: int) -> torch.Tensor:
        """Places in the batch: samples of a stream have none in the data set."""
        return torch.arange(self.args.batch_size)

    def state(self) -> dict:
        """How the shards are dealt, and where every stream of every process stands."""
        mine = {"positions": list(self.positions), "turn": self.turn}
        everyone = [mine]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, mine)
        return self.layout | {"processes": everyone}

    def resume(self, state: dict, path: Path) -> None:
        """Continue from `state`, or with a new pass where its positions mean nothing here."""
        differs = [name for name, value in self.layout.items() if state.get(name) != value]
        if not differs:
            mine = state["processes"][rank()]
            self.positions, self.turn = list(mine["positions"]), mine["turn"]
            return
        begun = [
            position for process in state.get("processes", ()) for position in process["positions"]
        ]
        epoch = max((epoch for epoch, _ in begun), default=-1) + 1
        self.positions = [(epoch, 0)] * len(self.positions)
        changes = ", ".join(f"{n} {state.get(n)} -> {self.layout[n]}" for n in differs)
        print_on_main(
            f"{path} has no position in shards dealt like these ({changes}): a new pass begins"
        )

    def describe(self) -> str:
        counts = self.layout["workers"]
        return (
            f"{len(self.shards)} shards dealt to {sum(counts)} stream(s), "
            f"an epoch of {self.samples} samples"
        )


def epoch_length(args) -> tuple[int, int]:
    """Samples and steps of an epoch of shards. Raises UserError where the flags do not say."""
    if args.samples_per_epoch:
        if args.samples_per_epoch < args.batch_size:
            raise UserError("--samples-per-epoch must be at least --batch-size")
        return args.samples_per_epoch, args.samples_per_epoch // args.batch_size
    if args.iterations:
        return args.iterations * args.batch_size, args.iterations
    raise UserError(
        "tar shards do not tell how many samples they hold: pass --samples-per-epoch N "
        "(1281167 for ImageNet) with --epochs, or the length of the run as --iterations N"
    )


def find_shards(data: str) -> list[str]:
    """URLs of all shards of DATA: webdataset's notation, and `*`, `?`, `[...]` for local files.

    Raises UserError where webdataset is absent, or a local shard is.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise UserError(
            "tar shards are read by webdataset, which is not installed: pip install webdataset"
        ) from error
    try:
        urls = expand_urls(data)
    except (AssertionError, ValueError) as error:
        raise UserError(f"cannot expand DATA {data}: {error}") from error
    shards = []
    for url in urls:
        local = not re.search(r"^pipe:|://|^-$", url)
        found = sorted(glob.glob(url)) if local and not os.path.isfile(url) else [url]
        if not found:
            raise UserError(f"no such shard: {url}")
        shards += found
    return shards
