"""Segment retrieval on PASCAL VOC without training ("Revisiting Contrastive Methods", Table 6).

Each image is cut into K segments by k-means on its feature map; a segment is described by the mean
of its pixels' embeddings. A segment of val gets the label of the nearest segment of train, which is
what most of that one's pixels are; the labels of val's pixels are then scored by IoU.

What the paper leaves open is read from the code that its repository names for this table
(wvangansbeke/Unsupervised-Semantic-Segmentation): images and label maps at 512 x 512, the last
stage dilated to stride 8, cosines, one neighbour; and for 7 classes, those of SegSort (Hwang et al.
2019) and of hierarchical grouping (Zhang and Maire 2020), the other 13 become void in train and
val alike and the background is left out of the mean. That code cuts out one salient object an image
and has no background segments. Ours: background is a label like the others, among 21; embeddings
have length 1 before k-means and means; a pixel has the embedding of its place in the map.

Shape legend:
    S: side of an image     H: side of its feature map     D: channels     K: segments of an image
    M: segments of train     Q: segments of val     C: classes, 21
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moco_det.common.errors import UserError, import_optional
from moco_det.common.files import evenly_spaced
from moco_det.common.images import read_image
from moco_det.common.processes import all_objects, print_on_main, rank, world_size
from pretrain.data.segmented import CLASSES, VOID, SegmentedImage
from pretrain.evaluation.knn import nearest
from pretrain.evaluation.overlays import captioned_row, highlighted, stacked
from pretrain.evaluation.spatial_features import unit_features

ALL = tuple(range(len(CLASSES)))
SEVEN = tuple(map(CLASSES.index, ("aeroplane", "bottle", "bus", "car", "cat", "cow", "person")))
QUERIES = 4096  # looked for at a time
NEEDS = "segment retrieval", "scikit-learn"


@dataclass(frozen=True)
class Segments:
    """The segments of some images.

    Args:
        descriptors: M x D, of length 1.
        counts: M x C, pixels of each class; void ones are not counted.
        images: M, the number of each one's image.
        maps: for each image, which of its segments each place belongs to, uint8 or more, H x H;
            numbered from 0.
    """

    descriptors: np.ndarray
    counts: np.ndarray
    images: np.ndarray
    maps: list[np.ndarray]

    def labels(self, classes: Sequence[int]) -> np.ndarray:
        """M: the class most of whose pixels a segment has, the first of several; -1 for none.

        Args:
            classes: that count; the others are void.
        """
        kept = np.zeros_like(self.counts)
        kept[:, list(classes)] = self.counts[:, list(classes)]
        return np.where(kept.any(axis=1), kept.argmax(axis=1), -1)


@dataclass(frozen=True)
class Segmenter:
    """Cuts images into segments.

    Args:
        backbone: a frozen network on `device`, images -> N x D x H x H.
        clusters: K; fewer where a map has fewer different places.
        image_size: S.
        threads: images that are cut at a time. The segments do not depend on it.
    """

    backbone: nn.Module
    clusters: int
    image_size: int
    seed: int
    device: torch.device
    threads: int = 1

    def segments(self, images: Sequence[SegmentedImage], what: str) -> Segments:
        """Those of all images, in their order. Collective: each process cuts every W-th.

        Raises:
            UserError: an image cannot be used, or scikit-learn is missing.
        """
        k_means()  # before the work
        print_on_main(f"segments of {len(images)} images of {what}")
        share = range(rank(), len(images), world_size())
        mine = dict(zip(share, self._cut([images[i] for i in share]), strict=True))
        cut = {number: one for part in all_objects(mine) for number, one in part.items()}
        ordered = [cut[number] for number in range(len(images))]
        descriptors, counts, maps = map(list, zip(*ordered, strict=True))
        numbers = np.repeat(np.arange(len(images)), [len(part) for part in descriptors])
        return Segments(np.concatenate(descriptors), np.concatenate(counts), numbers, maps)

    def _cut(self, images: Sequence[SegmentedImage]) -> Iterator[tuple]:
        """Descriptors K x D, counts K x C and the map H x H of each image."""
        with ThreadPoolExecutor(self.threads, initializer=_one_openmp_thread) as threads:
            for start in range(0, len(images), self.threads):
                some = images[start : start + self.threads]
                pixels, labels = zip(
                    *threads.map(lambda image: image.read(self.image_size), some), strict=True
                )
                features = [self._features(image) for image in pixels]
                yield from threads.map(self._describe, features, labels)

    def _features(self, pixels: np.ndarray) -> np.ndarray:
        """H x H x D."""
        images = torch.from_numpy(pixels)[None].to(self.device)
        return unit_features(self.backbone, images)[0].permute(1, 2, 0).cpu().numpy()

    def _describe(self, features: np.ndarray, labels: np.ndarray) -> tuple:
        return describe(features, labels, cluster(features, self.clusters, self.seed))


def k_means() -> Callable[..., Any]:
    """scikit-learn's k-means. Raises UserError where it is not installed."""
    return import_optional("sklearn.cluster", *NEEDS).KMeans


def _one_openmp_thread() -> None:
    """For a thread: the sums of several OpenMP threads are added in another order each time."""
    import_optional("threadpoolctl", *NEEDS).threadpool_limits(1, "openmp")


def cluster(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Which of at most `clusters` segments each place belongs to, H x H, from features H x H x D.

    Segments are numbered from 0 without a gap.
    """
    places = features.reshape(-1, features.shape[-1])
    means = k_means()(min(clusters, len(places)), n_init=1, random_state=seed)
    found = means.fit_predict(places)
    _, numbers = np.unique(found, return_inverse=True)
    return numbers.reshape(features.shape[:2]).astype(np.int32)


def describe(features: np.ndarray, labels: np.ndarray, segments: np.ndarray) -> tuple:
    """Descriptors K x D of length 1, counts of pixels K x C, and the segments themselves.

    Args:
        features: H x H x D.
        labels: S x S, classes or VOID.
        segments: H x H, numbered from 0 without a gap.
    """
    number = int(segments.max()) + 1
    member = (segments.reshape(1, -1) == np.arange(number)[:, None]).astype(features.dtype)
    sums = member @ features.reshape(-1, features.shape[-1])  # of the means the directions
    lengths = np.linalg.norm(sums, axis=1, keepdims=True).clip(min=np.finfo(sums.dtype).tiny)
    seen = labels != VOID
    both = enlarged(segments, labels.shape)[seen] * len(CLASSES) + labels[seen]
    counts = np.bincount(both, minlength=number * len(CLASSES)).reshape(number, len(CLASSES))
    return sums / lengths, counts, segments


def enlarged(segments: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map as large as its image: each pixel has the number of its place."""
    rows, columns = (
        np.arange(side) * places // side for side, places in zip(size, segments.shape, strict=True)
    )
    return segments[rows[:, None], columns[None, :]]


# -- retrieval ------------------------------------------------------------------------------------


def retrieve(
    bank: Segments, queries: Segments, classes: Sequence[int], device: torch.device, k: int = 1
) -> tuple[Tensor, Tensor]:
    """Cosines and numbers of each query's k nearest segments of the bank, Q x k both.

    Segments of the bank all of whose pixels are void are none. With fewer than k, what is missing
    is at a cosine of -infinity.

    Raises:
        UserError: the bank has no segment with a label.
    """
    labelled = np.flatnonzero(bank.labels(classes) >= 0)
    if not len(labelled):
        raise UserError("no segment of the training images has a pixel of these classes")
    rows = torch.from_numpy(bank.descriptors[labelled]).to(device)
    numbers = torch.from_numpy(labelled).to(device)
    parts = torch.from_numpy(queries.descriptors).split(QUERIES)
    found = [nearest(rows, numbers, part.to(device), k) for part in parts]
    cosines, near = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    return cosines, near


def mean_iou(predicted: np.ndarray, queries: Segments, classes: Sequence[int]) -> float:
    """IoU of val's pixels in percent, the mean over `classes` but the background where only some
    of the objects' classes are asked for.

    Classes that are neither there nor predicted are left out.

    Args:
        predicted: Q, a class for each segment.
        classes: all others are void.
    """
    confusion = np.zeros((len(CLASSES), len(CLASSES)))  # true x predicted
    np.add.at(confusion.T, predicted, queries.counts)
    true = sorted({0, *classes})
    confusion = confusion[true]
    hits = np.array([confusion[i, c] for i, c in enumerate(true)])
    union = confusion.sum(axis=1) + confusion.sum(axis=0)[true] - hits
    measured = (union > 0) & np.isin(true, classes)
    return 100 * float((hits[measured] / union[measured]).mean()) if measured.any() else 0.0


def scores(bank: Segments, queries: Segments, device: torch.device) -> dict[str, float]:
    """Mean IoU over the 7 classes and over all 21, in percent."""
    values = {}
    for classes in (SEVEN, ALL):
        known = (0, *SEVEN) if classes == SEVEN else ALL
        _, near = retrieve(bank, queries, known, device)
        predicted = bank.labels(known)[near[:, 0].numpy()]
        values[f"retrieval_miou_{len(classes)}"] = mean_iou(predicted, queries, classes)
    return values


# -- a sheet of retrieved segments ----------------------------------------------------------------


def draw_retrievals(
    bank: tuple[Segments, Sequence[SegmentedImage]],
    queries: tuple[Segments, Sequence[SegmentedImage]],
    device: torch.device,
    rows: int = 8,
    k: int = 5,
) -> Image.Image:
    """A row for some images of val: the segment with most of an object, and those nearest to it."""
    chosen = evenly_spaced(_object_segments(queries[0]), rows)
    cosines, near = retrieve(bank[0], queries[0], ALL, device, k)
    named = [[CLASSES[label] for label in side[0].labels(ALL)] for side in (bank, queries)]
    drawn = []
    for query in chosen:
        tiles = [_tile(*queries, query)]
        captions = [f"{queries[1][queries[0].images[query]].name}: {named[1][query]}"]
        for cosine, number in zip(cosines[query].tolist(), near[query].tolist(), strict=True):
            if cosine > -np.inf:
                tiles.append(_tile(*bank, number))
                captions.append(f"{named[0][number]} {cosine:.2f}")
        drawn.append(captioned_row(tiles, captions))
    return stacked(drawn)


def _object_segments(segments: Segments) -> list[int]:
    """Of each image with an object the segment with most of one; else all images' first ones."""
    pixels = np.where(segments.labels(ALL) > 0, segments.counts[:, 1:].max(axis=1), 0)
    by_image = [np.flatnonzero(segments.images == i) for i in range(len(segments.maps))]
    best = [int(some[pixels[some].argmax()]) for some in by_image]
    return [number for number in best if pixels[number]] or best


def _tile(segments: Segments, images: Sequence[SegmentedImage], number: int) -> np.ndarray:
    """A segment in its image, the rest of which is dimmed."""
    image = segments.images[number]
    pixels, numbered = read_image(images[image].image), segments.maps[image]
    first = int(np.flatnonzero(segments.images == image)[0])
    mask = enlarged(numbered, pixels.shape[:2]) == number - first
    return highlighted(pixels, mask)
