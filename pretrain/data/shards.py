"""Tar shards to batches of two views: data that does not fit a folder, read by `webdataset`.

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

import itertools
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from pretrain.data.augmentations import MoCoAugmentation
from pretrain.data.images import UNREADABLE_IN_A_ROW, UnreadableImage, collate_views, decode_image

READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)


class BrokenShard(Exception):
    """A shard cannot be opened, or ends too early, or holds no images."""


class Position(NamedTuple):
    """Where a stream stands: samples taken from its part of pass `epoch`, unreadable ones too."""

    epoch: int = 0
    samples: int = 0


class ShardBatch(NamedTuple):
    """What a stream gives: views (N, S, S, 3) uint8, messages, and where it stands after them.

    `broken` is the reason why it can give nothing: an exception would lose it on its way out of a
    worker process.
    """

    query: torch.Tensor | None
    key: torch.Tensor | None
    unreadable: list[str]
    position: Position
    broken: str | None = None


class Stream:
    """One of `streams` readers that share the shards.

    Args:
        number: of this stream, from 0.
        position: where to begin.
        buffer: samples that are held back to be drawn from, encoded.
    """

    def __init__(
        self,
        shards: list[str],
        number: int,
        streams: int,
        position: Position,
        view: MoCoAugmentation,
        seed: int,
        buffer: int,
    ):
        self.shards = shards
        self.number = number
        self.streams = streams
        self.position = position
        self.view = view
        self.seed = seed
        self.buffer = buffer
        self.reading = "no shard"

    def batches(self, size: int) -> Iterator[ShardBatch]:
        """Batches of `size` images, without end. A broken shard is the last one's `broken`."""
        samples = self.samples()
        try:
            while True:
                views = [self.next_views(samples) for _ in range(size)]
                yield ShardBatch(*collate_views(views), self.position)
        except BrokenShard as error:
            yield ShardBatch(None, None, [], self.position, str(error))

    def next_views(self, samples: Iterator[dict]):
        """Two views (S, S, 3) uint8 of the next readable image; messages on those before it."""
        unreadable = []
        while len(unreadable) < UNREADABLE_IN_A_ROW:
            sample = next(samples)
            rng = np.random.default_rng((self.seed, *self.position, self.number))
            extension = next(name for name in sample if not name.startswith("__"))
            place = f"{sample['__url__']}: {sample['__key__']}.{extension}"
            try:
                image = decode_image(sample[extension], place)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            return self.view(image, rng), self.view(image, rng), unreadable
        return None, None, unreadable

    def samples(self) -> Iterator[dict]:
        """webdataset's samples from `position` on, without end; `position` follows them."""
        while True:
            epoch, done = self.position
            for sample in itertools.islice(self._pass(epoch), done, None):
                self.position = Position(epoch, self.position.samples + 1)
                yield sample
            if self.position.samples == 0:
                shards = ", ".join(self.part(epoch))
                raise BrokenShard(f"no images in {shards} (looked for {', '.join(IMG_EXTENSIONS)})")
            self.position = Position(epoch + 1)

    def part(self, epoch: int) -> list[str]:
        """This stream's shards of pass `epoch`, in their order.

        All passes, one after the other, are dealt to the streams like cards: a pass begins with the
        stream that follows the one that got the last shard of the pass before it.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        first = (self.number - epoch * len(self.shards)) % self.streams
        return [self.shards[i] for i in order[first :: self.streams]]

    def _pass(self, epoch: int) -> Iterator[dict]:
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(self.part(epoch)),
            self._note_shard,
            webdataset.tarfile_to_samples(select_files=is_image),
            self._note_sample,
            webdataset.shuffle(
                self.buffer, initial=self.buffer, seed=f"{self.seed} {epoch} {self.number}"
            ),
        )
        try:
            yield from pipeline
        except READ_ERRORS as error:
            raise BrokenShard(f"broken shard {self.reading}: {reason(error)}") from error

    def _note_shard(self, shards: Iterator[dict]) -> Iterator[dict]:
        for shard in shards:
            self.reading = shard["url"]
            yield shard

    def _note_sample(self, samples: Iterator[dict]) -> Iterator[dict]:
        for sample in samples:
            self.reading = f"{sample['__url__']} after sample {sample['__key__']}"
            yield sample


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def reason(error: Exception) -> str:
    """The library appends streams and URLs to the arguments of what it passes on."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else repr(error))
    return str(text).split(" @ <")[0]


class ShardStreams(IterableDataset):
    """The streams of one process, one for each worker, which take turns.

    Args:
        shards: their URLs, as webdataset opens them.
        first, streams: the number of this process's first stream, and of all streams.
        positions: where each of this process's streams begins.
        turn: which of them begins.
        batch_size: of this process.
    """

    def __init__(
        self,
        shards: list[str],
        first: int,
        streams: int,
        positions: list[Position],
        turn: int,
        batch_size: int,
        view: MoCoAugmentation,
        seed: int,
        buffer: int,
    ):
        self.shards = shards
        self.first = first
        self.streams = streams
        self.positions = positions
        self.turn = turn
        self.batch_size = batch_size
        self.view = view
        self.seed = seed
        self.buffer = buffer

    def __iter__(self) -> Iterator[ShardBatch | None]:
        """The batches of this worker. None stands for a turn that was taken before the beginning:
        a DataLoader begins with worker 0."""
        info = get_worker_info()
        worker = info.id if info else 0
        if worker < self.turn:
            yield None
        stream = Stream(
            self.shards,
            self.first + worker,
            self.streams,
            self.positions[worker],
            self.view,
            self.seed,
            self.buffer,
        )
        yield from stream.batches(self.batch_size)
