"""Regions of feature maps to squares of one size: ROIAlign (He et al. 2017).

Every bin is a weighted sum of feature vectors, with weights that are a product of one factor for
its rows and one for its columns. Written so, as a sparse matrix product, pooling is vectorised over
channels in both directions, whereas torchvision's backward pass adds up single numbers in a single
thread: on a CPU that takes longer than the network. The numbers are those of
`torchvision.ops.roi_align` with `aligned=True`, up to the order of summation.

Legend: R regions, B bins a side, C channels, H x W the size of a feature map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RegionPooler(nn.Module):
    """ROIAlign from the feature map that suits each box's size.

    Pixel centres are at half-integers ("ROIAlignV2", torchvision's `aligned=True`).

    Args:
        bins: side of the pooled square.
        strides: of the maps it pools from, each twice the one before.
        sampling_ratio: samples per bin and side; 0 takes one for each feature-map pixel begun.
    """

    def __init__(self, bins: int, strides: list[int], sampling_ratio: int):
        super().__init__()
        self.bins = bins
        self.strides = list(strides)
        self.sampling_ratio = sampling_ratio

    def forward(self, features: list[Tensor], boxes: list[Tensor], every: int = 1) -> Tensor:
        """Maps (N, C, Hi, Wi) and N tensors (Ri, 4) -> (R, C, B', B'), see `roi_align`."""
        counts = torch.tensor([len(b) for b in boxes], device=features[0].device)
        image = torch.repeat_interleave(counts)
        boxes = torch.cat(boxes)
        regions = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
        if len(features) == 1:
            return self._align(features[0], regions, self.strides[0], every)
        finest = int(math.log2(self.strides[0]))
        levels = assign_levels(boxes, finest, finest + len(features) - 1) - finest
        pooled = [
            self._align(feature, regions[levels == level], stride, every)
            for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True))
        ]
        return torch.cat(pooled)[levels.argsort(stable=True).argsort()]

    def _align(self, feature: Tensor, regions: Tensor, stride: int, every: int) -> Tensor:
        return roi_align(feature, regions, self.bins, 1 / stride, self.sampling_ratio, every)


def assign_levels(boxes: Tensor, min_level: int, max_level: int) -> Tensor:
    """The pyramid level that each box (R, 4) is pooled from (FPN, equation 1).

    A box of 224 x 224 pixels, ImageNet's size, goes to level 4; one of twice the side to level 5.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    size = torch.sqrt((x1 - x0) * (y1 - y0))
    level = torch.floor(4 + torch.log2(size / 224 + 1e-8))
    return level.clamp(min_level, max_level).long()


def roi_align(
    feature: Tensor,
    regions: Tensor,
    bins: int,
    scale: float,
    sampling_ratio: int = 0,
    every: int = 1,
) -> Tensor:
    """Pool each region to a square of bins; differentiable in `feature`.

    Args:
        feature: (N, C, H, W).
        regions: (R, 5), the image's index and a box XYXY in pixels of the network's input.
        bins: side of the square, B.
        scale: of the feature map relative to the input, 1 / stride.
        sampling_ratio: samples per bin and side; 0 takes one for each feature-map pixel begun.
        every: keep only every so-many-th bin of rows and columns, from the first on: what a 1x1
            convolution with this stride would look at.

    Returns:
        (R, C, B', B') in the dtype of `feature`, B' = ceil(B / every); summed in float32 at least.
    """
    channels, height, width = feature.shape[1:]
    precision = torch.promote_types(feature.dtype, torch.float32)
    image, boxes = regions[:, 0].long(), regions[:, 1:].to(precision) * scale - 0.5
    x0, y0, x1, y1 = boxes.unbind(1)
    rows, row_weights = axis_weights(y0, y1, bins, height, sampling_ratio, every)
    columns, column_weights = axis_weights(x0, x1, bins, width, sampling_ratio, every)
    rows = rows + image[:, None, None] * height  # of all images, one below the other
    # (R, B', B', rows of a bin x columns of a bin)
    index = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    index, weight = index.flatten(3), weight.flatten(3)
    used = weight != 0
    vectors = feature.permute(0, 2, 3, 1).reshape(-1, channels).to(precision)
    pooled = WeightedSums.apply(vectors, index[used], weight[used], used.sum(3).flatten())
    side = rows.shape[1]
    return pooled.view(-1, side, side, channels).permute(0, 3, 1, 2).to(feature.dtype)


def axis_weights(
    start: Tensor, end: Tensor, bins: int, length: int, sampling_ratio: int, every: int
) -> tuple[Tensor, Tensor]:
    """Which positions of one axis a bin looks at, and with which weights, K at most.

    Args:
        start, end: (R,) of the regions, in positions of the map (position i has its centre at i).
        length: positions of the axis.

    Returns:
        positions (R, B', K) int64 and weights (R, B', K), zero where a bin needs fewer.
    """
    step = (end - start) / bins
    samples = torch.full_like(step, sampling_ratio) if sampling_ratio else step.ceil()
    most = max(int(samples.max()), 1) if len(samples) else 1
    number = torch.arange(most, device=start.device)
    bin_start = torch.arange(0, bins, every, device=start.device) * step[:, None] + start[:, None]
    samples = samples[:, None, None]
    at = bin_start[:, :, None] + (number + 0.5) * step[:, None, None] / samples.clamp(min=1)
    inside = (number < samples) & (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    low = at.floor()
    share = inside / samples.clamp(min=1)
    dense = at.new_zeros((len(start), bin_start.shape[1], length))
    dense.scatter_add_(2, low.long(), (1 + low - at) * share)
    dense.scatter_add_(2, (low.long() + 1).clamp(max=length - 1), (at - low) * share)
    return _nonzero_span(dense)


def _nonzero_span(dense: Tensor) -> tuple[Tensor, Tensor]:
    """(R, B, L) -> positions and values (R, B, K) from each row's first to its last non-zero."""
    length = dense.shape[2]
    position = torch.arange(length, device=dense.device)
    first = torch.where(dense != 0, position, length).amin(2, keepdim=True)
    last = torch.where(dense != 0, position, -1).amax(2, keepdim=True)
    longest = max(int((last - first).max()) + 1, 1) if dense.numel() else 1
    span = first + torch.arange(longest, device=dense.device)
    within = span.clamp(max=length - 1)
    return within, dense.gather(2, within) * (span < length)


class WeightedSums(torch.autograd.Function):
    """Row i of the result is the sum of `counts[i]` rows of `vectors`, each with its weight."""

    @staticmethod
    def forward(ctx, vectors: Tensor, index: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight, counts)
        ctx.rows = len(vectors)
        return _sum_rows(vectors, index, weight, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        # The transposed product, of the same form: to each vector, the sums that it went into.
        index, weight, counts = ctx.saved_tensors
        went_into = torch.repeat_interleave(counts)
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=ctx.rows)
        by_vector = _sum_rows(gradient.contiguous(), went_into[order], weight[order], counts)
        return by_vector, None, None, None


def _sum_rows(vectors: Tensor, index: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    begins = counts.cumsum(0) - counts
    return F.embedding_bag(index, vectors, begins, mode="sum", per_sample_weights=weight)
