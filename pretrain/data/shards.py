"""Tar shards to batches of views: data that does not fit a folder, read by `webdataset`.

The shards are dealt to streams, one for each loading worker of each process. A stream is endless:
pass after pass over the data, each in a new order of the shards, with a buffer that shuffles its
samples. What is promised, and tested:

- Order and views are functions of the seed, of the list of shards, of the number of streams and of
  the shuffle buffer alone. They do not depend on how fast the workers are.
- A pass reads every shard once, in one stream. Over the passes all streams are dealt equally many
  shards, give or take one; a stream with smaller ones begins its next pass earlier than others.
- Every process takes equally many batches, since no stream ends: the length of an epoch is what
  `--samples-per-epoch` says. What an epoch leaves over is where the next one begins.
- A resumed run continues with the very sample that follows the last one trained on, with the same
  views: neither a shard nor a sample is lost or repeated. For that each stream reads its pass again
  from the beginning, without decoding: at worst its share of all shards.
- Resumed with another number of shards, processes, workers, another seed or buffer, there is no
  such position. The run says so, and begins a new pass: what was left of the running pass is lost.

Shards that differ in their number of samples are fine. An unreadable image is passed over, up to
--max-unreadable; a shard that cannot be opened or ends too early ends the run. (One that is cut
exactly between two files passes for a shorter one: Python's tarfile sees no error.)

Samples of one batch and process are of one stream, hence of few shards: write shards in random
order of the images, not class by class.
"""

import glob
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from moco_det.common.errors import UserError, import_optional, one_line
from moco_det.common.images import UnreadableImage, check_image
from moco_det.common.processes import all_objects, print_on_main, rank, world_size
from pretrain.data.images import (
    UNREADABLE_IN_A_ROW,
    LoadedViews,
    Loading,
    UnreadableImages,
    ViewBatch,
    build_loader,
    collate_views,
    make_views,
)
from pretrain.data.listing import fingerprint, seen_alike
from pretrain.data.multi_crop import MultiCrop

READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)


class BrokenShard(Exception):
    """A shard cannot be opened, or ends too early, or holds no images."""


class Position(NamedTuple):
    """Where a stream stands: samples taken from its part of pass `epoch`, unreadable ones too."""

    epoch: int = 0
    samples: int = 0


class ShardBatch(NamedTuple):
    """What a stream gives: the views of a batch, and where it stands after them.

    `broken` is the reason why it can give nothing: an exception would lose it on its way out of a
    worker process.
    """

    loaded: LoadedViews | None
    position: Position
    broken: str | None = None


@dataclass
class Stream:
    """One of the readers that share the shards.

    Args:
        shards: all of them, their URLs as webdataset opens them.
        streams: how many share the shards.
        number: of this stream, from 0.
        crops: draws the views of an image.
        buffer: samples that a stream holds back to draw from, encoded.
        position: where to begin; it follows what is read.
    """

    shards: list[str]
    streams: int
    number: int
    crops: MultiCrop
    seed: int
    buffer: int
    position: Position

    reading = "no shard"

    def batches(self, size: int) -> Iterator[ShardBatch]:
        """Batches of `size` images, without end. A broken shard is the last one's `broken`."""
        samples = self.samples()
        try:
            while True:
                views = [self.next_views(samples) for _ in range(size)]
                yield ShardBatch(collate_views(views), self.position)
        except BrokenShard as error:
            yield ShardBatch(None, self.position, str(error))

    def next_views(self, samples: Iterator[dict]) -> LoadedViews:
        """Views of the next readable image; messages on those before it."""
        unreadable = []
        while len(unreadable) < UNREADABLE_IN_A_ROW:
            sample = next(samples)
            rng = np.random.default_rng((self.seed, *self.position, self.number))
            extension = next(name for name in sample if not name.startswith("__"))
            place = f"{sample['__url__']}: {sample['__key__']}.{extension}"
            try:
                encoded = check_image(sample[extension], place)
                return LoadedViews(*make_views(encoded, self.crops, rng), unreadable)
            except UnreadableImage as error:
                unreadable.append(f"{error.name}: {error.reason}")
        return LoadedViews([], [], unreadable)

    def samples(self) -> Iterator[dict]:
        """webdataset's samples from `position` on, without end; `position` follows them."""
        while True:
            epoch, done = self.position
            for sample in itertools.islice(self.read_pass(epoch), done, None):
                self.position = Position(epoch, self.position.samples + 1)
                yield sample
            if self.position.samples == 0:
                shards = ", ".join(self.share(epoch))
                raise BrokenShard(f"no images in {shards} (looked for {', '.join(IMG_EXTENSIONS)})")
            self.position = Position(epoch + 1)

    def share(self, epoch: int) -> list[str]:
        """This stream's shards of pass `epoch`, in their order.

        All passes, one after the other, are dealt to the streams like cards: a pass begins with the
        stream that follows the one that got the last shard of the pass before it.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        first = (self.number - epoch * len(self.shards)) % self.streams
        return [self.shards[i] for i in order[first :: self.streams]]

    def read_pass(self, epoch: int) -> Iterator[dict]:
        """webdataset's samples of this stream's share. Raises BrokenShard."""
        import webdataset  # optional: `find_shards` says how to install it
        from webdataset.tariterators import tar_file_expander, url_opener

        seed = f"{self.seed} {epoch} {self.number}"
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(self.share(epoch)),
            self._noted,
            url_opener,
            partial(tar_file_expander, select_files=_is_shown_image),
            _samples,
            self._noted,
            webdataset.shuffle(self.buffer, initial=self.buffer, seed=seed),
        )
        try:
            yield from pipeline
        except READ_ERRORS as error:
            raise BrokenShard(f"broken shard {self.reading}: {reason(error)}") from error

    def _noted(self, items: Iterator[dict]) -> Iterator[dict]:
        """Shards before they are opened, or samples as they are read; `reading` follows them."""
        for item in items:
            self.reading = item.get("url") or f"{item['__url__']} after sample {item['__key__']}"
            yield item


def _is_shown_image(path: str) -> bool:
    """Not what is hidden, as in `find_images`: macOS packs its own files beside the images."""
    parts = path.removeprefix("./").split("/")
    return is_image_file(path) and not any(part.startswith(".") for part in parts)


def _samples(files: Iterator[dict]) -> Iterator[dict]:
    """A sample for each image file. An empty one marks the end of a shard.

    webdataset's own samples are the files whose names are equal up to the first dot: of
    IMG_2020.05.00.jpg, IMG_2020.05.01.jpg and so on they would keep the first.
    """
    for file in files:
        if file:
            key, extension = os.path.splitext(file["fname"])
            content = {extension[1:].lower(): file["data"]}
            yield {"__key__": key, "__url__": file["__url__"], **content}


def reason(error: Exception) -> str:
    """The library appends streams and URLs to the arguments of what it passes on."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else repr(error))
    return str(text).split(" @ <")[0]


class ShardStreams(IterableDataset):
    """The streams of one process, one for each worker, in the order in which they take turns.

    Args:
        batch_size: of this process.
    """

    def __init__(self, streams: list[Stream], batch_size: int):
        self.streams = streams
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[ShardBatch]:
        """The batches of this worker; a DataLoader takes turns with them, beginning with 0."""
        worker = get_worker_info()
        return self.streams[worker.id if worker else 0].batches(self.batch_size)


class ShardSource:
    """ViewBatches of tar shards, read without end.

    Raises UserError where there are fewer shards than workers.

    Args:
        shards: see `find_shards`.
        crops: draws the views of an image.
        samples_per_epoch: of all processes.
        buffer: samples that a worker holds back and draws from.
    """

    def __init__(
        self,
        shards: list[str],
        crops: MultiCrop,
        loading: Loading,
        samples_per_epoch: int,
        buffer: int,
    ):
        self.loading = loading
        self.conditions = crops.conditions
        self.samples = samples_per_epoch
        self.steps_per_epoch = samples_per_epoch // loading.batch_size
        counts = all_objects(max(1, loading.workers))
        if len(shards) < sum(counts):
            raise UserError(
                f"{len(shards)} shards cannot feed {sum(counts)} workers, those of "
                f"{world_size()} process(es): pass a smaller -j, or write more shards"
            )
        self.layout = {
            "shards": len(shards),
            "workers": counts,
            "seed": loading.seed,
            "shuffle_buffer": buffer,
            "names": _fingerprint(shards)["hash"],
        }
        settings = {"crops": crops, "seed": loading.seed, "buffer": buffer}
        self.new_stream = partial(Stream, shards, sum(counts), **settings)
        self.positions = [(0, 0)] * counts[rank()]
        self.turn = 0
        self.unreadable = UnreadableImages(self.samples, loading.max_unreadable)
        self.batches = None

    def start(self, epoch: int, step: int) -> None:
        """Nothing: the next batch is always the one that follows the last one."""

    def __iter__(self) -> Iterator[ViewBatch]:
        # Not kept in a generator of its own: it would hold this object that holds it, and the
        # workers, which ignore SIGTERM, would not hear of the end of the run.
        if self.batches is None:
            workers, pin_memory = self.loading.workers, self.loading.pin_memory
            self.batches = iter(build_loader(self._streams(), workers, pin_memory, batch_size=None))
        # In place of indices in the data set, which samples of a stream do not have.
        indices = torch.arange(self.loading.batch_size)
        for batch in self.batches:
            if batch.broken:
                raise UserError(batch.broken)
            self.positions[self.turn] = tuple(batch.position)
            self.turn = (self.turn + 1) % len(self.positions)
            views, free_crops, unreadable = batch.loaded
            self.unreadable.add(unreadable, fatal=not views)
            yield ViewBatch(views, indices, free_crops)

    def _streams(self) -> ShardStreams:
        first = sum(self.layout["workers"][: rank()])
        streams = [
            self.new_stream(number=first + worker, position=Position(*position))
            for worker, position in enumerate(self.positions)
        ]
        turns = streams[self.turn :] + streams[: self.turn]
        return ShardStreams(turns, self.loading.batch_size // world_size())

    def state(self) -> dict:
        """How the shards are dealt, and where every stream of every process stands. Collective."""
        mine = {"positions": list(self.positions), "turn": self.turn}
        return self.layout | {"processes": all_objects(mine)}

    def resume(self, state: dict, path: Path) -> None:
        """Continue from `state`, or with a new pass where its positions mean nothing here."""
        layout = dict(self.layout)
        if "names" not in state:  # of an earlier version
            del layout["names"]
        differs = [name for name, value in layout.items() if state.get(name) != value]
        if not differs:
            mine = state["processes"][rank()]
            self.positions, self.turn = list(mine["positions"]), mine["turn"]
            return
        processes = state.get("processes", ())
        begun = [epoch for process in processes for epoch, _ in process["positions"]]
        epoch = max(begun, default=-1) + 1
        self.positions = [(epoch, 0)] * len(self.positions)
        changes = ", ".join(f"{n} {state.get(n)} -> {self.layout[n]}" for n in differs)
        print_on_main(
            f"{path} has no position in shards dealt like these ({changes}): a new pass begins"
        )

    def describe(self) -> str:
        return (
            f"{self.layout['shards']} shards dealt to {sum(self.layout['workers'])} stream(s), "
            f"an epoch of {self.samples} samples"
        )


MOST_SHARDS = 1_000_000  # LAION-5B has a quarter of it


def find_shards(data: str) -> list[str]:
    """URLs of all shards of DATA: webdataset's notation, and `*`, `?`, `[...]` for local files.

    Raises UserError where webdataset is absent, a local shard is, or processes see different ones.
    Collective.
    """
    return seen_alike(lambda: _find_shards(data), _fingerprint)


def _fingerprint(shards: list[str]) -> dict:
    """By the files' own names: where the data lie may change, and differ between computers."""
    seen = fingerprint(os.fsencode(os.path.basename(url)) for url in shards)
    return {"shards": seen["images"], "hash": seen["hash"]}


def _expansions(pattern: str) -> int:
    """How many URLs the braces of a pattern stand for; where they are nested, at most."""
    count, innermost = 1, re.compile(r"\{([^{}]*)\}")
    while found := innermost.findall(pattern):
        for inside in found:
            ends = re.match(r"(-?\d+|[a-zA-Z])\.\.(-?\d+|[a-zA-Z])(\.\.|$)", inside)
            if ends:
                first, last = (ord(e) if e.isalpha() else int(e) for e in ends.groups()[:2])
                count *= abs(last - first) + 1
            else:
                count *= inside.count(",") + 1
        pattern = innermost.sub("", pattern)
    return count


def _find_shards(data: str) -> list[str]:
    shardlists = import_optional("webdataset.shardlists", "reading tar shards", "webdataset")
    try:
        if sum(map(_expansions, data.split("::"))) > MOST_SHARDS:
            raise ValueError(f"its braces stand for more than {MOST_SHARDS:,} shards")
        urls = shardlists.expand_urls(data)
    except (AssertionError, ValueError) as error:
        reason = one_line(error, 80)
        raise UserError(f"cannot expand DATA {one_line(data, 180)}: {reason}") from error
    shards = []
    for url in urls:
        local = not re.search(r"^pipe:|://|^-$", url)
        found = sorted(glob.glob(url)) if local and not os.path.isfile(url) else [url]
        if not found:
            raise UserError(f"no such shard: {one_line(url, 250)}")
        shards += found
    return shards
