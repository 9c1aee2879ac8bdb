"""ROIAlign (He et al. 2017): the features in boxes of any size -> squares of one size.

One function with two kernels: on a GPU torchvision's operator, elsewhere a sparse matrix product.

In the product every bin is a weighted sum of feature vectors, with weights that are a product of
one factor for its rows and one for its columns. So pooling is vectorised over channels in both
directions, whereas torchvision's backward pass adds up single numbers in a single thread: on a CPU
that takes longer than the network. The numbers are those of `torchvision.ops.roi_align`, up to the
order of summation. Where bins are left out, the product serves on a GPU as well: the operator would
compute them all.

Shapes: N images, Ri boxes in image i, R = sum(Ri), C channels, feature maps of size H x W, B bins
a side of which B' are computed, E entries: pairs of a bin and a position that it looks at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from moco_det.native.modeling.boxes import group
from moco_det.native.modeling.layers import on_gpu


@dataclass(frozen=True)
class ROIPooler:
    """ROIAlign from the feature map that suits each box's size.

    Args:
        output_size: bins a side, B.
        strides: of the maps it pools from, each twice the one before.
        sampling_ratio: samples per bin and side; 0 takes one for each feature-map pixel begun.
        aligned: pixel centres are at half-integers ("ROIAlignV2", torchvision's `aligned=True`).
            Without, in the original "ROIAlign", all is shifted by half a pixel of the map, and no
            region is less than such a pixel wide or high.
    """

    output_size: int
    strides: Sequence[int]
    sampling_ratio: int
    aligned: bool = True

    def __call__(self, features: list[Tensor], boxes: list[Tensor], bin_stride: int = 1) -> Tensor:
        """Maps (N, C, Hi, Wi) and N tensors (Ri, 4) -> (R, C, B', B'), see `roi_align`."""
        # One list of boxes, each with the index of its image: (R, 5).
        rois = [torch.cat([torch.full_like(b[:, :1], i), b], dim=1) for i, b in enumerate(boxes)]
        rois = torch.cat(rois)
        align = partial(
            roi_align,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            bin_stride=bin_stride,
            aligned=self.aligned,
        )
        if len(features) == 1:
            return align(features[0], rois, spatial_scale=1 / self.strides[0])
        # Level by level, then back into the order of the boxes.
        finest = int(math.log2(self.strides[0]))
        levels = assign_levels(rois[:, 1:], finest, finest + len(features) - 1) - finest
        order, counts = group(levels, len(features))
        pooled = [
            align(feature, of_level, spatial_scale=1 / stride)
            for feature, of_level, stride in zip(
                features, rois[order].split(counts), self.strides, strict=True
            )
        ]
        return torch.cat(pooled)[order.argsort()]


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
    rois: Tensor,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int = 0,
    bin_stride: int = 1,
    aligned: bool = True,
) -> Tensor:
    """Pool each box to a square of bins; differentiable in `feature`.

    Args:
        feature: (N, C, H, W).
        rois: (R, 5), the image's index and a box XYXY in pixels of the network's input.
        output_size: bins a side, B.
        spatial_scale: of the feature map relative to the input, 1 / stride.
        sampling_ratio: samples per bin and side; 0 takes one for each feature-map pixel begun.
        bin_stride: compute only every so-many-th bin of rows and columns, from the first on: what
            a 1x1 convolution with this stride would look at.
        aligned: see `ROIPooler`.

    Returns:
        (R, C, B', B'), B' = ceil(B / bin_stride), as `feature`'s dtype; summed in float32 or finer.
    """
    precision = torch.promote_types(feature.dtype, torch.float32)
    rois = rois.to(precision)
    if on_gpu(feature) and bin_stride == 1:
        pooled = torchvision.ops.roi_align(
            feature.to(precision), rois, output_size, spatial_scale, sampling_ratio, aligned
        )
        return pooled.to(feature.dtype)
    window = spatial_scale, sampling_ratio, bin_stride, aligned
    return _roi_align_by_product(feature, rois, output_size, *window)


def _roi_align_by_product(
    feature: Tensor,
    rois: Tensor,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    bin_stride: int,
    aligned: bool,
) -> Tensor:
    """`roi_align` as a sparse matrix product; `rois` in the precision of the sums."""
    channels, height, width = feature.shape[1:]

    # From pixels of the input, whose centres are at half-integers, to positions of the map, at i.
    x0, y0, x1, y1 = (rois[:, 1:] * spatial_scale).unbind(1)
    if aligned:
        x0, y0, x1, y1 = x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5
    smallest = -torch.inf if aligned else 1.0
    roi_height, roi_width = (y1 - y0).clamp(min=smallest), (x1 - x0).clamp(min=smallest)

    # The two factors of the weights, and the rows and columns where they are not 0: (R, B').
    row_weights = axis_weights(y0, roi_height, output_size, height, sampling_ratio, bin_stride)
    column_weights = axis_weights(x0, roi_width, output_size, width, sampling_ratio, bin_stride)
    first_row, num_rows = _span(row_weights)
    first_column, num_columns = _span(column_weights)

    # One entry for each position of each bin, bin after bin. Bins differ in size: those of a thin
    # region may have many positions. `bin_of` (E,) is an entry's bin, counted in the order
    # (R, B', B'), and `number` its place among the entries of that bin.
    counts = (num_rows[:, :, None] * num_columns[:, None, :]).flatten()
    bin_of = torch.repeat_interleave(counts)
    number = torch.arange(len(bin_of), device=counts.device) - (counts.cumsum(0) - counts)[bin_of]

    # Each entry's region and bin (i, j) in it, then the position (row, column) that it looks at.
    side = row_weights.shape[1]
    region, i, j = bin_of // side**2, bin_of // side % side, bin_of % side
    row = first_row[region, i] + number // num_columns[region, j]
    column = first_column[region, j] + number % num_columns[region, j]
    weight = row_weights[region, i, row] * column_weights[region, j, column]

    # The sparse product: bins x positions, times positions x channels.
    position = (rois[:, 0].long()[region] * height + row) * width + column
    vectors = feature.permute(0, 2, 3, 1).reshape(-1, channels).to(rois)  # (N * H * W, C)
    pooled = WeightedSums.apply(vectors, position, weight, bin_of, counts)  # (R * B' * B', C)
    return pooled.view(-1, side, side, channels).permute(0, 3, 1, 2).to(feature.dtype)


def axis_weights(
    start: Tensor,
    extent: Tensor,
    output_size: int,
    length: int,
    sampling_ratio: int,
    bin_stride: int,
) -> Tensor:
    """(R, B', L): with which weights a bin looks at the positions of one axis of `length` L.

    start, extent: (R,) of the regions, in positions of the map (position i has its centre at i).
    """
    # Every bin is sampled at so many points, evenly spaced: (R, B', most).
    bin_size = extent / output_size
    samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio else bin_size.ceil()
    most = max(int(samples.max()), 1) if len(samples) else 1
    number = torch.arange(most, device=start.device)
    bins = torch.arange(0, output_size, bin_stride, device=start.device)
    bin_start = bins * bin_size[:, None] + start[:, None]
    samples = samples[:, None, None]
    at = bin_start[:, :, None] + (number + 0.5) * bin_size[:, None, None] / samples.clamp(min=1)

    # Points beyond the map count as 0, those within a position of its border as on the border.
    inside = (number < samples) & (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)

    # A point is interpolated between the positions below and above it, and the points averaged.
    low = at.floor()
    share = inside / samples.clamp(min=1)
    weights = at.new_zeros((*bin_start.shape, length))
    weights.scatter_add_(2, low.long(), (1 + low - at) * share)
    weights.scatter_add_(2, (low.long() + 1).clamp(max=length - 1), (at - low) * share)
    return weights


def _span(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(R, B', L) -> the first position with a weight, and the number of positions to the last."""
    length = weights.shape[2]
    position = torch.arange(length, device=weights.device)
    position, none = position.expand_as(weights), weights == 0
    first = position.masked_fill(none, length).amin(2)
    last = position.masked_fill(none, -1).amax(2)
    return first, (last - first + 1).clamp(min=0)


class WeightedSums(torch.autograd.Function):
    """Row i of the result is the sum of `counts[i]` rows of `vectors`, each with its weight.

    `index` (E,) says which rows of `vectors`, those for row 0 of the result first, and `row_of`
    (E,) to which row of the result they go.
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
        counts = index.new_zeros(ctx.rows).index_add_(0, index, torch.ones_like(index))
        by_vector = _sum_rows(gradient.contiguous(), row_of[order], weight[order], counts)
        return by_vector, None, None, None, None


def _sum_rows(vectors: Tensor, index: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    begins = counts.cumsum(0) - counts
    return F.embedding_bag(index, vectors, begins, mode="sum", per_sample_weights=weight)
