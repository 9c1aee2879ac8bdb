"""Regions of feature maps to squares of one size: ROIAlign (He et al. 2017).

Every bin is a weighted sum of feature vectors, with weights that are a product of one factor for
its rows and one for its columns. Written so, as a sparse matrix product, pooling is vectorised over
channels in both directions, whereas torchvision's backward pass adds up single numbers in a single
thread: on a CPU that takes longer than the network. The numbers are those of
`torchvision.ops.roi_align`, up to the order of summation.

Legend: R regions, B bins a side, C channels, H x W the size of a feature map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ROIPooler(nn.Module):
    """ROIAlign from the feature map that suits each box's size.

    Args:
        bins: side of the pooled square.
        strides: of the maps it pools from, each twice the one before.
        sampling_ratio: samples per bin and side; 0 takes one for each feature-map pixel begun.
        aligned: pixel centres are at half-integers ("ROIAlignV2", torchvision's `aligned=True`).
            Without, in the original "ROIAlign", all is shifted by half a pixel of the map, and no
            region is less than such a pixel wide or high.
    """

    def __init__(self, bins: int, strides: list[int], sampling_ratio: int, aligned: bool = True):
        super().__init__()
        self.bins = bins
        self.strides = list(strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

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
        return roi_align(
            feature, regions, self.bins, 1 / stride, self.sampling_ratio, every, self.aligned
        )


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
    aligned: bool = True,
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
        aligned: see `ROIPooler`.

    Returns:
        (R, C, B', B') in the dtype of `feature`, B' = ceil(B / every); summed in float32 at least.
    """
    channels, height, width = feature.shape[1:]
    precision = torch.promote_types(feature.dtype, torch.float32)
    x0, y0, x1, y1 = (regions[:, 1:].to(precision) * scale).unbind(1)
    if aligned:
        x0, y0, x1, y1 = x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5
    smallest = -torch.inf if aligned else 1.0
    height_of, width_of = (y1 - y0).clamp(min=smallest), (x1 - x0).clamp(min=smallest)
    on_rows = axis_weights(y0, height_of, bins, height, sampling_ratio, every)  # (R, B', H)
    on_columns = axis_weights(x0, width_of, bins, width, sampling_ratio, every)  # (R, B', W)
    (first_row, rows), (first_column, columns) = _span(on_rows), _span(on_columns)  # (R, B')

    # One entry for each position of each bin: a thin region may have bins of many positions.
    counts = (rows[:, :, None] * columns[:, None, :]).flatten()
    bin_of = torch.repeat_interleave(counts)
    number = torch.arange(len(bin_of), device=counts.device) - (counts.cumsum(0) - counts)[bin_of]
    side = on_rows.shape[1]
    region, i, j = bin_of // side**2, bin_of // side % side, bin_of % side
    row = first_row[region, i] + number // columns[region, j]
    column = first_column[region, j] + number % columns[region, j]
    weight = on_rows[region, i, row] * on_columns[region, j, column]
    index = (regions[:, 0].long()[region] * height + row) * width + column

    vectors = feature.permute(0, 2, 3, 1).reshape(-1, channels).to(precision)
    pooled = WeightedSums.apply(vectors, index, weight, bin_of, counts)
    return pooled.view(-1, side, side, channels).permute(0, 3, 1, 2).to(feature.dtype)


def axis_weights(
    start: Tensor, extent: Tensor, bins: int, length: int, sampling_ratio: int, every: int
) -> Tensor:
    """(R, B', L): with which weights a bin looks at the positions of one axis of `length` L.

    start, extent: (R,) of the regions, in positions of the map (position i has its centre at i).
    """
    step = extent / bins
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
    weights = at.new_zeros((*bin_start.shape, length))
    weights.scatter_add_(2, low.long(), (1 + low - at) * share)
    weights.scatter_add_(2, (low.long() + 1).clamp(max=length - 1), (at - low) * share)
    return weights


def _span(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(R, B, L) -> the first position with a weight, and the number of positions to the last."""
    length = weights.shape[2]
    position = torch.arange(length, device=weights.device)
    first = torch.where(weights != 0, position, length).amin(2)
    last = torch.where(weights != 0, position, -1).amax(2)
    return first, (last - first + 1).clamp(min=0)


class WeightedSums(torch.autograd.Function):
    """Row i of the result is the sum of `counts[i]` rows of `vectors`, each with its weight.

    `index` (M,) says which rows of `vectors`, those for row 0 of the result first, and `row_of`
    (M,) to which row of the result they go.
    """

    @staticmethod
    def forward(ctx, vectors: Tensor, index, weight, row_of, counts) -> Tensor:
        ctx.save_for_backward(index, weight, row_of)
        ctx.rows = len(vectors)
        return _sum_rows(vectors, index, weight, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        # The transposed product, of the same form: to each vector, the sums that it went into.
        index, weight, row_of = ctx.saved_tensors
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=ctx.rows)
        by_vector = _sum_rows(gradient.contiguous(), row_of[order], weight[order], counts)
        return by_vector, None, None, None, None


def _sum_rows(vectors: Tensor, index: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    begins = counts.cumsum(0) - counts
    return F.embedding_bag(index, vectors, begins, mode="sum", per_sample_weights=weight)
