"""Do two engines compute the same? Something to compute on, and the comparison of the results."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moco_det.config.checks import is_depth, is_semantic, num_classes
from moco_det.datasets.semantic import IGNORED
from moco_det.densepose.points import BOX_SIDE, NUM_CHARTS, NUM_PARTS, DensePosePoints

# Standard deviations of the predictors' outputs with which every part of a detector has something
# to do: proposals that overlap, detections of some confidence.
SPREADS = {
    "objectness_logits": 2.0,
    "anchor_deltas": 0.3,
    "cls_score": 3.0,
    "bbox_pred": 1.0,
    "predictor": 2.0,  # of masks, and of labels of pixels
    "score_lowres": 3.0,  # of keypoints
    "ann_index_lowres": 3.0,  # of dense pose, and the next three
    "index_uv_lowres": 3.0,
    "u_lowres": 0.5,
    "v_lowres": 0.5,
}


@dataclass(frozen=True)
class Difference:
    """Of one quantity in two engines.

    `absolute` is the largest difference of two numbers; `relative` the largest over the tensors of
    max|a - b| / max|a|, where a is the reference, and infinite where indices differ or a is 0. Of
    bool tensors, the pixels of masks, of which rounding decides a few, `absolute` is the number of
    those that differ, and `relative` its share of those that are true in the reference. Both are
    nan where `problem` says why nothing could be subtracted.
    """

    quantity: str
    values: int  # how many numbers the reference has
    absolute: float
    relative: float
    problem: str = ""

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance  # False for nan


def compare(
    reference: Mapping[str, Sequence[Tensor]], other: Mapping[str, Sequence[Tensor]]
) -> list[Difference]:
    """One `Difference` for every quantity of either side."""
    names = list(dict.fromkeys([*reference, *other]))
    return [_difference(name, reference.get(name), other.get(name)) for name in names]


def _difference(
    name: str, reference: Sequence[Tensor] | None, other: Sequence[Tensor] | None
) -> Difference:
    values = sum(tensor.numel() for tensor in reference or ())
    if reference is None or other is None:
        problem = "missing in the " + ("reference" if reference is None else "other")
        return Difference(name, values, math.nan, math.nan, problem)
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (reference, other)]
    if shapes[0] != shapes[1]:
        pairs = zip(*shapes, strict=False)
        first = next((f"{b}, not {a}" for a, b in pairs if a != b), "another number of tensors")
        return Difference(name, values, math.nan, math.nan, f"shape: {first}")
    pairs = [(a, b) for a, b in zip(reference, other, strict=True) if a.numel()]
    measured = [_error_and_size(a, b) for a, b in pairs]
    errors = [error for error, _ in measured]
    relative = [error / size if error != 0 else error for error, size in measured]
    return Difference(name, values, _largest(errors), _largest(relative))


def _error_and_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What two tensors differ by, and what this is relative to: see `Difference`."""
    if a.dtype == torch.bool:
        return (a != b).sum().double(), a.sum()
    size = a.double().abs().max() if a.is_floating_point() else a.new_zeros(())
    return (a.double() - b.double()).abs().max(), size


def _largest(numbers: Sequence[Tensor]) -> float:
    """nan if one is, as in torch and unlike Python's max; 0 of none."""
    return torch.stack([x.double().cpu() for x in numbers]).max().item() if numbers else 0.0


def table(differences: Sequence[Difference], tolerance: float) -> str:
    """A line for each quantity, with a verdict."""
    rows = [
        [
            x.quantity,
            x.values,
            f"{x.absolute:.1e}",
            f"{x.relative:.1e}",
            "ok" if x.within(tolerance) else x.problem or f"above {tolerance:g}",
        ]
        for x in differences
    ]
    columns = ["quantity", "values", "max abs. diff.", "max rel. diff.", "verdict"]
    align = ("left", "right", "right", "right", "left")
    return tabulate(rows, columns, tablefmt="simple", colalign=align, disable_numparse=True)


def build_items(cfg, height: int, width: int, count: int, seed: int) -> list[dict]:
    """What `draw_items` draws, with the ground truth that the model of `cfg` is trained on."""
    model = cfg.MODEL
    items = draw_items(height, width, count, num_classes(cfg), seed)
    if is_semantic(cfg):
        return [with_label_map(item) for item in items]
    if is_depth(cfg):
        return [with_depth_map(item) for item in items]
    for index, item in enumerate(items):
        if model.MASK_ON:
            item["gt_masks"] = draw_outlines(item["gt_boxes"], seed + index)
            if cfg.INPUT.MASK_FORMAT == "bitmask":
                item["gt_masks"] = fill_outlines(item["gt_masks"], item["image"].shape[1:])
        if model.KEYPOINT_ON:
            keypoints = model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            item["gt_keypoints"] = draw_keypoints(item["gt_boxes"], keypoints, seed + index)
        if model.DENSEPOSE_ON:
            item["gt_densepose"] = draw_dense_pose(len(item["gt_boxes"]), seed + index)
    return items


def draw_items(
    height: int, width: int, count: int, num_classes: int, seed: int, boxes: int = 3
) -> list[dict]:
    """Training inputs (see `parity.probe`): coloured rectangles, whose boxes are exact, on noise.

    The first image is `height` x `width`, each next one smaller than that by some eighths, so that
    padding has a part; originals are twice as large.
    """
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        h, w = height - index % 3 * (height // 8), width - index % 4 * (width // 8)
        noise = torch.rand((1, 3, -(-h // 8), -(-w // 8)), generator=generator) * 255
        image = nn.functional.interpolate(noise, scale_factor=8)[0, :, :h, :w].clone()
        corners = torch.rand((boxes, 2), generator=generator) * 0.6
        sides = 0.15 + torch.rand((boxes, 2), generator=generator) * 0.25
        scale = torch.tensor([w, h])
        rectangles = (torch.cat([corners, corners + sides], 1) * scale.repeat(2)).round()
        for x0, y0, x1, y1 in rectangles.int().tolist():
            image[:, y0:y1, x0:x1] = torch.rand((3, 1, 1), generator=generator) * 255
        items.append(
            {
                "image": image.to(torch.uint8),
                "gt_boxes": rectangles,
                "gt_classes": torch.randint(num_classes, (boxes,), generator=generator),
                "height": 2 * h,
                "width": 2 * w,
            }
        )
    return items


def with_label_map(item: dict) -> dict:
    """The rectangles of a drawn item as labels on background 0; the lowest rows are ignored."""
    labels = torch.zeros(item["image"].shape[1:], dtype=torch.int64)
    boxes = item["gt_boxes"].int().tolist()
    for (x0, y0, x1, y1), label in zip(boxes, item["gt_classes"].tolist(), strict=True):
        labels[y0:y1, x0:x1] = label
    labels[-len(labels) // 8 :] = IGNORED
    return {key: item[key] for key in ("image", "height", "width")} | {"sem_seg": labels}


def with_depth_map(item: dict) -> dict:
    """A floor that goes away, the rectangles of a drawn item standing on it; the lowest rows have
    no depth."""
    height, width = item["image"].shape[1:]
    depths = torch.linspace(9, 2, height)[:, None].repeat(1, width)
    for x0, y0, x1, y1 in item["gt_boxes"].int().tolist():
        depths[y0:y1, x0:x1] = depths[y1 - 1, 0].clone()
    depths[-height // 8 :] = 0
    return {key: item[key] for key in ("image", "height", "width")} | {"depth": depths}


def draw_outlines(boxes: Tensor, seed: int) -> list[list[np.ndarray]]:
    """A quadrilateral for each of the boxes (G, 4), with a corner on each of its sides.

    Polygons as a mapper makes them: a list for each object, [x0, y0, x1, y1, ...] float64 each.
    """
    share = torch.rand((len(boxes), 4), generator=torch.Generator().manual_seed(seed))
    objects = []
    for (x0, y0, x1, y1), (a, b, c, d) in zip(boxes.tolist(), share.tolist(), strict=True):
        top, bottom = x0 + a * (x1 - x0), x0 + c * (x1 - x0)
        right, left = y0 + b * (y1 - y0), y0 + d * (y1 - y0)
        objects.append([np.array([top, y0, x1, right, bottom, y1, x0, left])])
    return objects


def fill_outlines(objects: Sequence[list[np.ndarray]], size: tuple[int, int]) -> Tensor:
    """Polygons of G objects -> the pixels that they cover, bool (G, height, width)."""
    masks = torch.zeros((len(objects), *size), dtype=torch.bool)
    for mask, polygons in zip(masks, objects, strict=True):
        shape = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
        mask.copy_(torch.from_numpy(coco_mask.decode(shape)))
    return masks


def draw_keypoints(boxes: Tensor, count: int, seed: int) -> Tensor:
    """(G, count, 3) of x, y, visibility: in the boxes (G, 4) and a little beyond.

    Some are visible (2), some hidden (1), and some not labelled, and then all zero, as in COCO.
    """
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((len(boxes), count, 2), generator=generator) * 1.2 - 0.1
    corner, opposite = boxes[:, None].split([2, 2], dim=2)
    visibility = torch.randint(3, (len(boxes), count, 1), generator=generator)
    points = corner + share * (opposite - corner)
    return torch.cat([points, visibility], dim=2) * (visibility > 0)


def draw_dense_pose(objects: int, seed: int) -> list[DensePosePoints | None]:
    """Points all over the boxes, some on background, on parts in squares; none of every third."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(objects):
        x, y, u, v = torch.rand((4, 40), generator=generator)
        charts = torch.randint(NUM_CHARTS + 1, (40,), generator=generator)
        parts = torch.randint(NUM_PARTS + 1, (8, 8), generator=generator, dtype=torch.uint8)
        parts = parts.repeat_interleave(BOX_SIDE // 8, 0).repeat_interleave(BOX_SIDE // 8, 1)
        points = DensePosePoints(x * BOX_SIDE, y * BOX_SIDE, charts, u, v, parts)
        found.append(None if index % 3 == 2 else points)
    return found


def randomize_for_parity(
    model: nn.Module, items: list[dict], names: Collection[str], seed: int
) -> None:
    """Replace an initialisation under which nothing would happen by one under which all does.

    A fresh detector has norms that are the identity, and predictors so small that no class is sure
    and no box moves: differences in any of them would stay hidden. Of the arrays called `names`,
    norms get random weights and statistics, trained ones then those of `items`; predictors are
    scaled until their outputs spread as `SPREADS` says.

    Args:
        model: a detector that takes `items`; changed in place.
    """
    names = set(names)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        uniform = torch.rand(value.shape, generator=generator).to(value.device)
        if name in names and name.endswith(("norm.weight", "norm.running_var")):
            value.copy_(0.5 + uniform)
        elif name in names and name.endswith(("norm.bias", "norm.running_mean")):
            value.copy_(uniform - 0.5)
    layers = {n: m for n, m in model.named_modules() if f"{n}.weight" in names}
    momenta = {m: m.momentum for m in layers.values() if getattr(m, "momentum", None) is not None}
    spreads = {m: SPREADS.get(n.rpartition(".")[2]) for n, m in layers.items()}
    with torch.no_grad():
        # A forward pass leaves its own statistics in the norms.
        for norm in momenta:
            norm.momentum = 1.0
        model.train()(items)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        handles = [_scale_once(m, spread) for m, spread in spreads.items() if spread is not None]
        model.eval()(items)
    for handle in handles:
        handle.remove()
    model.train()


def _scale_once(layer: nn.Module, spread: float) -> RemovableHandle:
    """The next forward pass of `layer` scales its weight, and gives the new output.

    An RPN's layers run on every map of a pyramid, of which the first, the largest, decides.
    """

    def scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        handle.remove()
        layer.weight.mul_(spread / output.std())
        return layer(*inputs)

    handle = layer.register_forward_hook(scale)
    return handle
