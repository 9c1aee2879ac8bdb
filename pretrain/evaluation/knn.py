"""Weighted kNN classification, the monitor of Wu et al. 2018 (Sec. 3.4), on a bank of any size.

The bank is divided: each process holds the features of the images that it encodes. The queries go
to all of them; each finds the nearest ones of its part, and the nearest of all are among these.

Shape legend:
    W: processes     M: images of this process's part of the bank     D: pooled features
    Q: queries       k: neighbours
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_det.common.errors import UserError, is_out_of_memory
from moco_det.common.images import UnreadableImage
from moco_det.common.processes import (
    all_objects,
    from_main,
    gather,
    gather_rows,
    is_main,
    rank,
    world_size,
)
from pretrain.data.augmentations import resize_and_center_crop
from pretrain.data.labelled import LabelledImages, LabelledSplit, Splits, find_class_folders
from pretrain.data.listing import class_folders
from pretrain.data.sheets import TILE, draw_sheet, ending
from pretrain.evaluation.features import extract, extract_share, pooled

QUERIES = 1024  # looked for at a time, those of all processes
ROWS = 16384  # of the bank at a time: with the queries' similarities 0.2 GiB at D = 2048
SHOWN, NEIGHBOURS = 4, 6  # images of val that are drawn, each with so many of train
HALF_FROM = 2**28  # bytes; a larger part of the bank is kept in float16
Result = TypeVar("Result")


# -- neighbours and their votes -------------------------------------------------------------------


def nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and labels of each query's k nearest rows, Q x k both, the nearest one first.

    A bank of fewer rows is filled up by rows at a cosine of -infinity.

    Args:
        bank: M x D, of any precision, and queries: Q x D, L2-normalised; labels: M.
    """
    found = queries.new_full((len(queries), k), -torch.inf)
    found_labels = labels.new_zeros(len(queries), k)
    for some, their_labels in zip(bank.split(ROWS), labels.split(ROWS), strict=True):
        cosines = queries @ some.to(queries.dtype).T
        cosines, places = cosines.topk(min(k, len(some)), dim=1)
        pair = (found, cosines), (found_labels, their_labels[places])
        found, found_labels = nearest_of(*(torch.cat(both, dim=1) for both in pair), k)
    return found, found_labels


def nearest_of(cosines: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines of each row, and their labels."""
    cosines, places = cosines.topk(k, dim=1)
    return cosines, labels.gather(1, places)


def votes(cosines: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Class scores Q x classes: each neighbour votes with exp(cosine / temperature).

    Scores are relative to the nearest one's vote: at a low temperature votes exceed fp32.

    Args:
        cosines, labels: of `nearest`.
    """
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    return cosines.new_zeros(len(cosines), classes).scatter_add_(1, labels, weights)


def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> Tensor:
    """Class scores Q x classes of the votes of the k nearest; the bank is one process's.

    Args:
        bank: M x D and queries: Q x D, L2-normalised; bank_labels: M, in [0, classes).
    """
    return votes(*nearest(bank, bank_labels, queries, min(k, len(bank))), classes, temperature)


# -- the monitor ----------------------------------------------------------------------------------


@dataclass
class KnnMonitor:
    """Classifies DATA/val by the labelled features of DATA/train; trains on nothing.

    Features are the globally pooled ones below the projection head, in evaluation mode. The classes
    are those of train. Collective. Raises UserError where val has others, or processes see
    different data.

    Args:
        k, temperature: of `weighted_knn`; the temperature is sigma in later code of its authors.
        bank_size: so many images of train, drawn by `seed`; None for all.
        splits: classes, train and val, where DATA has no class folders.
    """

    data: Path
    image_size: int
    workers: int
    device: torch.device
    k: int = 200
    temperature: float = 0.07
    bank_size: int | None = None
    seed: int = 0
    splits: Splits | None = None

    def __post_init__(self):
        self.found: list[tuple[int, list[tuple[float, int]]]] = []  # for `draw_neighbours`
        self.classes, bank, queries = self.splits or find_class_folders(self.data)
        self.bank = self._images(sampled(bank, self.bank_size, self.seed))
        self.queries = self._images(queries)

    @staticmethod
    def applies_to(data: Path) -> bool:
        """Whether DATA has class folders in both train/ and val/, on every process. Collective."""
        return all(all_objects(all(class_folders(data / split) for split in ("train", "val"))))

    def top1(self, encoder: nn.Module) -> float:
        """Top-1 accuracy in percent of k neighbours; see `top1_of`."""
        return self.top1_of(encoder, [self.k])[0]

    @torch.inference_mode()
    def top1_of(self, encoder: nn.Module, ks: Sequence[int]) -> list[float]:
        """Top-1 accuracies in percent of several numbers of neighbours, from the same features.

        The same values on every process.

        Raises UserError where there is no readable image in train or in val, or where a process
        runs out of memory; on every process.
        """
        was_training = encoder.training
        backbone = pooled(encoder.eval())
        try:
            bank, numbers = together(lambda: self._share(backbone, self.bank))
            queries, asked = together(lambda: self._share(backbone, self.queries))
        finally:
            encoder.train(was_training)
        counts = gather_rows([len(numbers), len(asked)])  # W x 2
        if not counts.sum(dim=0).all():
            part = "val" if counts[:, 0].any() else "train"
            raise UserError(f"no image in {self.data / part} can be read")
        ks = [min(k, int(counts[:, 0].sum())) for k in ks]
        together(lambda: self._reserve(bank.shape[1], max(ks)))
        correct, step = np.zeros(len(ks), int), max(1, QUERIES // world_size())
        shown = set(np.linspace(0, len(asked) - 1, SHOWN).astype(int)) if is_main() else set()
        self.found.clear()
        for start in range(0, int(counts[:, 1].max()), step):
            mine = (padded(part[start : start + step], step) for part in (queries, asked))
            # Of all processes' queries. The main process's are the first ones.
            everyones, of_everyone = map(gather, mine)
            found = self._search(bank, numbers, everyones.float(), max(ks))
            correct += [self._correct(*(part[:, :k] for part in found), of_everyone) for k in ks]
            for row in sorted(shown & set(range(start, min(start + step, len(asked))))):
                cosines, near = (part[row - start, :NEIGHBOURS].tolist() for part in found)
                self.found.append((int(asked[row]), list(zip(cosines, near, strict=True))))
        return from_main([100.0 * int(count) / int(counts[:, 1].sum()) for count in correct])

    def _search(self, bank: Tensor, numbers: Tensor, queries: Tensor, k: int):
        """Cosines and numbers of the images of train that are nearest to each query, Q x k both."""
        found = together(lambda: nearest(bank, numbers, queries, k))
        if world_size() > 1:  # W parts' neighbours side by side: Q x Wk
            parts = (gather(part).chunk(world_size()) for part in found)
            found = nearest_of(*(torch.cat(part, dim=1) for part in parts), k)
        return found

    def _correct(self, cosines: Tensor, near: Tensor, asked: Tensor) -> int:
        """How many queries are classified well; numbers of images below 0 are none."""
        labels, targets = (
            torch.as_tensor(images.split.labels, device=self.device)
            for images in (self.bank, self.queries)
        )
        scores = votes(cosines, labels[near], len(self.classes), self.temperature)
        return int(((scores.argmax(1) == targets[asked]) & (asked >= 0)).sum())

    def draw_neighbours(self) -> np.ndarray | None:
        """Of the last `top1`, on the main process: a row for each of some images of val, followed
        by those of train that are nearest to it. uint8 RGB pixels; None where one is unreadable."""
        try:
            rows = [
                [self._tile(self.queries, number, "query")]
                + [self._tile(self.bank, near, f"{cosine:.3f}") for cosine, near in neighbours]
                for number, neighbours in self.found
            ]
        except UnreadableImage:  # it was readable a moment ago
            return None
        return np.asarray(draw_sheet(rows)) if rows else None

    def _tile(self, images: LabelledImages, number: int, said: str) -> tuple[np.ndarray, str]:
        pixels = resize_and_center_crop(images.split.read(number), TILE)
        return pixels, f"{said}\n{ending(self.classes[images.split.labels[number]])}"

    def _images(self, split: LabelledSplit) -> LabelledImages:
        crop = partial(resize_and_center_crop, size=self.image_size)
        return LabelledImages(split, self.image_size, crop)

    def _share(self, backbone: nn.Module, images: LabelledImages) -> tuple[Tensor, Tensor]:
        """Normalised features M x D and numbers M of the readable ones among this process's images.

        They are written where they stay, since a list of batches would be as large once more.
        """
        black = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8)
        example, filled = extract(backbone, black.to(self.device)), 0  # 1 x D
        room = -(-len(images) // world_size())
        half = room * example.nbytes > HALF_FROM
        dtype = torch.float16 if half else example.dtype
        features = example.new_empty(room, example.shape[1], dtype=dtype)
        numbers = torch.empty(room, dtype=torch.int64, device=self.device)
        mine = torch.arange(rank(), len(images), world_size(), device=self.device)
        seen = 0
        for some, labels in extract_share(backbone, images, self.workers, self.device):
            readable = labels >= 0
            end = filled + int(readable.sum())
            features[filled:end] = F.normalize(some[readable], dim=1)
            numbers[filled:end] = mine[seen : seen + len(labels)][readable]
            filled, seen = end, seen + len(labels)
        return features[:filled], numbers[:filled]

    def _reserve(self, dim: int, k: int) -> None:
        """Take and leave what a search needs, so that no process fails while others wait for it.

        On a GPU it stays with this process.
        """
        rows = dim * (QUERIES + ROWS) + 6 * QUERIES * (k * world_size() + len(self.classes))
        torch.empty(rows + QUERIES * ROWS, device=self.device)


def sampled(split: LabelledSplit, size: int | None, seed: int) -> LabelledSplit:
    """`size` images of a split, in its order: a function of the seed; all, where it has no more."""
    if size is None or size >= len(split.paths):
        return split
    chosen = np.sort(np.random.default_rng(seed).permutation(len(split.paths))[:size])
    return split.subset(chosen)


def padded(rows: Tensor, count: int) -> Tensor:
    """`rows` and, up to `count` of them, more that are -1."""
    missing = rows.new_full((count - len(rows), *rows.shape[1:]), -1)
    return torch.cat([rows, missing])


def together(function: Callable[[], Result]) -> Result:
    """What `function` gives, unless a process runs out of memory in it. Collective.

    `function` itself must not be collective: the others would wait for a process that has failed.

    Raises:
        UserError: one did; on every process.
    """
    result, failed = None, False
    try:
        result = function()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if failed and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if gather_rows([float(failed)]).any():
        raise UserError(
            "out of memory while looking for neighbours: pass --knn-bank N for a smaller bank"
        )
    return result
