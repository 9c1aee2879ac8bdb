"""The keypoint branch of Mask R-CNN (He et al. 2017, section 5): network, loss, inference.

A keypoint is one cell of an S x S grid over its box. Continuous coordinates become cells and
back by Heckbert's rule: cell = floor(x), x = cell + 0.5.

Shapes: N images, Ri proposals in image i, R = sum(Ri), Gi objects in image i, P keypoints of an
object, C channels, D detections in one image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_det.native.modeling.boxes import Losses, SampledProposals
from moco_det.native.modeling.layers import kaiming_fill

IGNORED = -1  # in the place of a cell


class KRCNNConvDeconvUpsampleHead(nn.Sequential):
    """3x3 convolutions with ReLU, then upsampling twice by 2: transposed convolution, bilinear.

    Args:
        channels: of the pooled input.
        num_keypoints: P.
        conv_dims: widths of the convolutions.
        loss_weight: factor of the loss.
        keypoints_per_image: the loss is divided by so many for each image; None: by the number of
            keypoints that it is the sum over.
    """

    def __init__(
        self,
        channels: int,
        num_keypoints: int,
        conv_dims: tuple[int, ...],
        loss_weight: float,
        keypoints_per_image: float | None,
    ):
        super().__init__()
        for k, dim in enumerate(conv_dims, start=1):
            self.add_module(f"conv_fcn{k}", nn.Conv2d(channels, dim, 3, padding=1))
            self.add_module(f"conv_fcn_relu{k}", nn.ReLU())
            channels = dim
        self.score_lowres = nn.ConvTranspose2d(channels, num_keypoints, 4, stride=2, padding=1)
        kaiming_fill(self)
        self.loss_weight = loss_weight
        self.keypoints_per_image = keypoints_per_image

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, S / 4, S / 4) -> heatmaps (R, P, S, S), the logits of the cells."""
        x = super().forward(x)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def losses(self, x: Tensor, sampled: SampledProposals, keypoints: list[Tensor]) -> Losses:
        """Cross-entropy over the cells, of the keypoints that are labelled and in their proposal.

        Without any of them it is 0, and still has gradients.

        Args:
            x: (R, C, S / 4, S / 4), what was pooled for `sampled`, which are all foreground.
            keypoints: N tensors (Gi, P, 3), of the images' objects.
        """
        heatmaps = self(x)
        # The cell that each keypoint is in, (R, P), and whether it is in any.
        points = matched_keypoints(sampled, keypoints)
        cells, valid = keypoint_cells(points, torch.cat(sampled.boxes), heatmaps.shape[-1])
        # One softmax over the S * S cells for each of these.
        cells = cells.masked_fill(~valid, IGNORED)
        loss = F.cross_entropy(
            heatmaps.flatten(2).flatten(0, 1),
            cells.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        if self.keypoints_per_image is None:
            normalizer = valid.sum().clamp(min=1)
        else:
            normalizer = len(sampled.boxes) * self.keypoints_per_image
        return {"loss_keypoint": loss / normalizer * self.loss_weight}

    def predict(self, x: Tensor, boxes: Tensor) -> Tensor:
        """(D, C, S / 4, S / 4) pooled from `boxes` (D, 4) -> see `heatmaps_to_keypoints`."""
        return heatmaps_to_keypoints(self(x), boxes)


def matched_keypoints(sampled: SampledProposals, keypoints: list[Tensor]) -> Tensor:
    """N tensors (Gi, P, 3) -> those of each proposal's object, (R, P, 3)."""
    return torch.cat([k[index] for k, index in zip(keypoints, sampled.matched, strict=True)])


def select_with_visible_keypoints(
    sampled: SampledProposals, keypoints: list[Tensor]
) -> SampledProposals:
    """The proposals that hold a labelled keypoint of their object, occluded ones included."""
    points, visibility = matched_keypoints(sampled, keypoints).split([2, 1], dim=2)
    corner, opposite = torch.cat(sampled.boxes)[:, None].split([2, 2], dim=2)
    inside = ((points >= corner) & (points <= opposite)).all(dim=2)
    return sampled.where((inside & (visibility[..., 0] >= 1)).any(dim=1))


def keypoint_cells(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The cell of a `side` x `side` grid over its box that each keypoint is in.

    A keypoint on the right or lower border of its box is in the last cell (Detectron2).

    Args:
        keypoints: (R, P, 3), x, y, visibility.
        boxes: (R, 4).

    Returns:
        (R, P) int64, row * side + column; and (R, P) bool, whether the keypoint is labelled and in
        the box: elsewhere the cell is meaningless.
    """
    points, visibility = keypoints[..., :2], keypoints[..., 2]
    corner, opposite = boxes[:, None].split([2, 2], dim=2)
    cell = ((points - corner) * (side / (opposite - corner))).floor().long()
    cell = cell.masked_fill(points == opposite, side - 1)
    valid = ((cell >= 0) & (cell < side)).all(dim=2) & (visibility > 0)
    return cell[..., 1] * side + cell[..., 0], valid


@torch.no_grad()
def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """Where the heatmaps, resized to their boxes, are largest.

    Each is resized (bicubic) to the box's size in whole pixels. The score is the exponential of
    the maximum over the sum of those of the S x S cells: comparable between boxes of all sizes,
    it may exceed 1 (Detectron2).

    Args:
        heatmaps: (D, P, S, S), logits.
        boxes: (D, 4).

    Returns:
        (D, P, 3): x, y in the boxes' frame, score.
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sizes.ceil()
    # Of each keypoint the maximum, (D, P), and where in the resized heatmap it is.
    maxima = heatmaps.new_zeros(heatmaps.shape[:2])
    positions = torch.zeros_like(maxima, dtype=torch.int64)
    for heatmap, (width, height), *result in zip(
        heatmaps, pixels.int().tolist(), maxima, positions, strict=True
    ):
        resized = F.interpolate(heatmap[None], (height, width), mode="bicubic", align_corners=False)
        torch.max(resized[0].flatten(1), dim=1, out=tuple(result))
    # exp(maximum) / sum(exp(cells)), with the maximum drawn into the sum: nothing overflows.
    excess = heatmaps.flatten(2) - maxima[..., None]
    scores = 1 / excess.exp().sum(dim=2)
    # From pixels of the resized heatmaps to those of the image.
    width = pixels[:, :1].long()
    at = torch.stack([positions % width, positions // width], dim=2).to(heatmaps.dtype) + 0.5
    at = at * (sizes / pixels)[:, None] + boxes[:, None, :2]
    return torch.cat([at, scores[..., None]], dim=2)


def build_keypoint_head(cfg, channels: int) -> KRCNNConvDeconvUpsampleHead:
    heads, head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_KEYPOINT_HEAD
    per_image = None
    if not head.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS:
        per_image = head.NUM_KEYPOINTS * heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
    return KRCNNConvDeconvUpsampleHead(
        channels, head.NUM_KEYPOINTS, head.CONV_DIMS, head.LOSS_WEIGHT, per_image
    )
