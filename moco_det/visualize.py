"""Annotations and predictions of every task, drawn on their images.

`draw_annotations` and `draw_prediction` are for an image of a data set, whatever its task, and
`compared` puts the two side by side for some of its images. Below them, `draw_objects` draws
`Objects`, `draw_labels` a label map, and `draw_depth` a depth map.

N objects in an image of H x W pixels, K keypoints each. Pictures are uint8 (3, H, W), RGB.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import utils
from torchvision.transforms.functional import pad, pil_to_tensor, to_pil_image

from moco_det.colours import GOLDEN_ANGLE, Colour, Labels, distinct, ink, palette
from moco_det.common.images import read_upright
from moco_det.datasets import CocoDataset, Dataset, Record, read_depth, read_labels
from moco_det.datasets.depth import decode_depth
from moco_det.datasets.problems import one_line
from moco_det.datasets.semantic import IGNORED
from moco_det.densepose.points import BOX_SIDE, decode_iuv, has_points, read_points

MASK_OPACITY = 0.45
LABEL_MAP_OPACITY = 0.6
SURFACE_OPACITY = 0.8
FARTHEST_SHOWN = 10.0  # metres; what is beyond has the last colour. NYU's depths end here
COMPARED, LONGEST_COMPARED = 4, 640  # images of a data set, pixels of a side of one
SCORE_COMPARED = 0.5  # lowest score that is drawn beside annotations
KEYPOINT_SHOWN = 0.05  # score of a predicted keypoint from which it is drawn; Detectron2's


@dataclass(frozen=True)
class Objects:
    """What is drawn of N objects, the last on top.

    `boxes` (N, 4) XYXY; `labels` N texts; `colours` N; `masks` bool (N, H, W); `keypoints`
    (N, K, 2), x and y, of which those are drawn that `visible` bool (N, K) says. Of dense pose
    `points`, N of (P, 5): x, y, chart, U, V; and `surfaces`, N of uint8 (3, h, w), the chart,
    U * 255 and V * 255 of the pixels of each box.
    """

    boxes: Tensor
    labels: list[str]
    colours: list[Colour]
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    visible: Tensor | None = None
    points: list[Tensor] | None = None
    surfaces: list[Tensor] | None = None

    def enlarged(self, scale: float) -> "Objects":
        """The same objects on an image that is `scale` times as large."""
        changes: dict[str, Any] = {"boxes": self.boxes * scale}
        if self.masks is not None:
            changes["masks"] = _repeated(self.masks, scale)
        if self.keypoints is not None:
            changes["keypoints"] = self.keypoints * scale
        if self.points is not None:
            changes["points"] = [p * torch.tensor([scale, scale, 1, 1, 1]) for p in self.points]
        if self.surfaces is not None:
            changes["surfaces"] = [_repeated(surface, scale) for surface in self.surfaces]
        return replace(self, **changes)


def read_image(record: Record) -> Tensor:
    """The image of a record, upright by its EXIF tag, as its boxes are.

    Raises:
        UserError: it cannot be read.
    """
    return pil_to_tensor(read_upright(record["file_name"]))


def draw_annotations(
    image: Tensor,
    record: Record,
    dataset: Dataset,
    classes: Sequence[str] | None = None,
    scale: float = 1,
) -> Tensor:
    """The image with what the data set says of it.

    Args:
        classes: names to write, instead of the data set's own.
        scale: how much larger the picture is than the image, so that a small one has room for
            its labels.
    """
    classes, shades = classes or dataset.classes, palette(dataset.classes)
    if dataset.evaluator == "sem_seg":
        labels = read_labels(record, len(dataset.classes))
        return draw_labels(_enlarged(image, scale), _repeated(labels, scale), classes, shades)
    if dataset.evaluator == "depth":
        return draw_depth(_enlarged(image, scale), _repeated(read_depth(record), scale))
    stated, size = (record["height"], record["width"]), tuple(image.shape[1:])
    if stated != size:
        _skip(f"the size of image {record['image_id']}, {list(stated)}; its file has {list(size)}")
        record = record | {"height": size[0], "width": size[1]}
    objects = annotated_objects(record, classes, shades)
    return draw_objects(_enlarged(image, scale), objects.enlarged(scale), skeleton_of(dataset))


def draw_prediction(
    image: Tensor,
    prediction: Mapping[str, Any],
    dataset: Dataset,
    threshold: float,
    classes: Sequence[str] | None = None,
    scale: float = 1,
) -> Tensor:
    """The image with what was predicted, objects from a score of `threshold` on.

    `classes` and `scale`: see `draw_annotations`.
    """
    classes, shades = classes or dataset.classes, palette(dataset.classes)
    size = tuple(image.shape[1:])
    if dataset.evaluator == "sem_seg":
        labels = predicted_labels(prediction, size)
        return draw_labels(_enlarged(image, scale), _repeated(labels, scale), classes, shades)
    if dataset.evaluator == "depth":
        depths = predicted_depths(prediction, size)
        return draw_depth(_enlarged(image, scale), _repeated(depths, scale))
    objects = predicted_objects(prediction, size, classes, threshold, shades)
    return draw_objects(_enlarged(image, scale), objects.enlarged(scale), skeleton_of(dataset))


def compared(
    dataset: Dataset, predictions: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """`COMPARED` images, spread over a data set: the annotated one, and to its right the predicted.

    Args:
        predictions: of the data set's images, see `moco_det.evaluation`.

    Yields:
        "DATASET/NUMBER", the same each time, and a picture at most 2 x `LONGEST_COMPARED` wide.
    """
    records, found = dataset.records(), {p["image_id"]: p for p in predictions}
    name = re.sub(r"[^A-Za-z0-9-]+", "_", dataset.name)
    for number, index in enumerate(
        np.unique(np.linspace(0, len(records) - 1, COMPARED, dtype=int))
    ):
        record = records[index]
        if record["image_id"] not in found:
            continue
        image = read_image(record)
        scale = min(1, LONGEST_COMPARED / max(image.shape[1:]))
        prediction = found[record["image_id"]]
        pair = (
            draw_annotations(image, record, dataset, scale=scale),
            draw_prediction(image, prediction, dataset, SCORE_COMPARED, scale=scale),
        )
        yield f"{name}/{number}", torch.cat(pair, dim=2)


def _enlarged(image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image
    height, width = (round(side * scale) for side in image.shape[1:])
    large = interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return large.round().clamp(0, 255).to(torch.uint8)


def _repeated(pixels: Tensor | np.ndarray, scale: float) -> Tensor | np.ndarray:
    """(..., H, W) -> (..., scale * H, scale * W), without values between those there are."""
    rows, columns = (
        np.minimum(((np.arange(round(side * scale)) + 0.5) / scale).astype(int), side - 1)
        for side in pixels.shape[-2:]
    )
    return pixels[..., rows[:, None], columns[None, :]]


def surface_colours(charts: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Places on the body's surface (...) -> their colours, uint8 (3, ...).

    The chart is the hue; the brightness grows with U and the saturation with V, both in [0, 1].
    """
    thirds = torch.tensor([0.0, 4.0, 2.0]).reshape(3, *[1] * charts.ndim)
    hue = ((charts * GOLDEN_ANGLE % 1 * 6 + thirds) % 6 - 3).abs().sub(1).clamp(0, 1)
    saturation, brightness = 0.4 + 0.6 * v, 0.45 + 0.55 * u
    return (255 * brightness * (1 - saturation * (1 - hue))).round().to(torch.uint8)


def annotated_objects(
    record: Record, classes: Sequence[str], shades: Sequence[Colour] | None = None
) -> Objects:
    """The annotated objects; crowds and VOC's difficult objects say so in their label.

    `shades`: the colours of the classes.
    """
    annotations = record["annotations"]
    flags = {"iscrowd": " (crowd)", "difficult": " (difficult)"}
    labels = [
        classes[a["category_id"]] + "".join(text for key, text in flags.items() if a.get(key))
        for a in annotations
    ]
    size = record["height"], record["width"]
    category_ids = [annotation["category_id"] for annotation in annotations]
    masks = keypoints = visible = points = None
    if any(map(has_points, annotations)):
        points = [_surface_points(annotation) for annotation in annotations]
    if any("segmentation" in annotation for annotation in annotations):
        masks = _stack([_mask(a.get("segmentation"), size) for a in annotations], size)
    if any("keypoints" in annotation for annotation in annotations):
        most = max(len(annotation.get("keypoints", ())) for annotation in annotations)
        keypoints = torch.tensor([a.get("keypoints") or [0] * most for a in annotations])
        keypoints = keypoints.reshape(len(annotations), -1, 3).float()
        keypoints, visible = keypoints[..., :2], keypoints[..., 2] > 0  # 1: hidden, 2: seen
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    by_object = masks is not None or keypoints is not None
    colours = _colours(category_ids, boxes, by_object, shades or palette(classes))
    return Objects(boxes, labels, colours, masks, keypoints, visible, points=points)


def _surface_points(annotation: Mapping[str, Any]) -> Tensor:
    """(P, 5): x and y on the image, chart, U, V; P is 0 without any."""
    if not has_points(annotation):
        return torch.zeros(0, 5)
    found = read_points(annotation)
    x0, y0, x1, y1 = annotation["bbox"]
    x = x0 + found.x * (x1 - x0) / BOX_SIDE
    y = y0 + found.y * (y1 - y0) / BOX_SIDE
    return torch.stack([x, y, found.charts.float(), found.u, found.v], dim=1)


def predicted_objects(
    prediction: Mapping[str, Any],
    size: tuple[int, int],
    classes: Sequence[str],
    threshold: float,
    shades: Sequence[Colour] | None = None,
) -> Objects:
    """The objects of a prediction with a score of at least `threshold`, the surest last.

    Args:
        prediction: "boxes", "scores", "classes", and where there are, "segmentations",
            "keypoints" and "densepose"; see `moco_det.evaluation`.
        size: height and width of the image.
        shades: the colours of the classes.
    """
    scores = torch.as_tensor(prediction["scores"], dtype=torch.float32)
    order = [i for i in scores.argsort().tolist() if scores[i] >= threshold]
    category_ids = torch.as_tensor(prediction["classes"])[order].tolist()
    masks = keypoints = visible = surfaces = None
    if "densepose" in prediction:
        surfaces = [torch.from_numpy(decode_iuv(prediction["densepose"][i])) for i in order]
    if "segmentations" in prediction:
        masks = _stack([_mask(prediction["segmentations"][i], size) for i in order], size)
    if "keypoints" in prediction and order:
        keypoints = torch.as_tensor(prediction["keypoints"], dtype=torch.float32)[order]
        keypoints, visible = keypoints[..., :2], keypoints[..., 2] >= KEYPOINT_SHOWN
    boxes = torch.as_tensor(prediction["boxes"], dtype=torch.float32).reshape(-1, 4)[order]
    labels = [f"{classes[c]} {scores[i]:.0%}" for c, i in zip(category_ids, order, strict=True)]
    by_object = masks is not None or keypoints is not None
    colours = _colours(category_ids, boxes, by_object, shades or palette(classes))
    return Objects(boxes, labels, colours, masks, keypoints, visible, surfaces=surfaces)


def _colours(
    category_ids: Sequence[int], boxes: Tensor, by_object: bool, shades: Sequence[Colour]
) -> list[Colour]:
    """Those of the classes; where objects have shapes, kin of them, so that neighbours differ."""
    colours = [shades[index] for index in category_ids]
    return distinct(boxes, colours) if by_object else colours


def _skip(text: str) -> None:
    """Say what is not drawn."""
    print(f"skipped: {one_line(text)}", file=sys.stderr, flush=True)


def _mask(shape: list | Mapping[str, Any] | None, size: tuple[int, int]) -> Tensor:
    """Polygons or an RLE as bool (H, W); nothing for None, or an RLE of another size."""
    if isinstance(shape, Mapping) and tuple(shape["size"]) != tuple(size):
        _skip(f"a mask of (height, width) {list(shape['size'])}; its image has {list(size)}")
        shape = None
    if not shape:
        return torch.zeros(size, dtype=torch.bool)
    if isinstance(shape, list):
        shape = coco_mask.merge(coco_mask.frPyObjects(shape, *size))
    return torch.from_numpy(coco_mask.decode(shape)).bool()


def _stack(masks: list[Tensor], size: tuple[int, int]) -> Tensor:
    return torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool)


def predicted_labels(prediction: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The label map uint8 (H, W) of a semantic prediction; `IGNORED` where it has no class."""
    labels = np.full(size, IGNORED, dtype=np.uint8)
    for segment in prediction["sem_seg"]:
        labels[_mask(segment["segmentation"], size).numpy()] = segment["category_id"]
    return labels


def predicted_depths(prediction: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Those (H, W) of a prediction, in metres; 0 without one, or where it is of another size."""
    packed = prediction.get("depth")
    if packed and tuple(packed["size"]) == tuple(size):
        return decode_depth(packed)
    if packed:
        _skip(f"depths of (height, width) {packed['size']}; their image has {list(size)}")
    return np.zeros(size, np.float32)


def skeleton_of(dataset: Dataset) -> list[tuple[int, int]]:
    """The pairs of keypoints that are joined by a line, by their number; [] where none are given.

    They are COCO's `skeleton`, which the annotation file holds beside the keypoints' names.
    """
    return list(dataset.skeleton) if isinstance(dataset, CocoDataset) else []


def draw_objects(
    image: Tensor, objects: Objects, skeleton: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """The image with masks, surfaces, points, keypoints, boxes and labels over it."""
    if not len(objects.boxes):
        return image
    width = _stroke(image)
    if objects.masks is not None:
        image = utils.draw_segmentation_masks(image, objects.masks, MASK_OPACITY, objects.colours)
    if objects.surfaces is not None:
        for surface, box in zip(objects.surfaces, objects.boxes, strict=True):
            image = _draw_surface(image, surface, box)
    if objects.points is not None:
        image = _draw_points(image, torch.cat(objects.points))
    if objects.keypoints is not None:
        for points, visible, shade in zip(
            objects.keypoints, objects.visible, objects.colours, strict=True
        ):
            image = utils.draw_keypoints(
                image,
                points[None],
                connectivity=list(skeleton) or None,
                colors=tuple(255 - channel for channel in shade),  # seen on its own mask
                radius=2 * width,
                width=width,
                visibility=visible[None],
            )
    image = utils.draw_bounding_boxes(image, objects.boxes, colors=objects.colours, width=width)
    return _write(image, objects.boxes.numpy(), objects.labels, objects.colours)


def _draw_surface(image: Tensor, surface: Tensor, box: Tensor) -> Tensor:
    """The image with a box's surface (3, h, w) over it, from the pixel of the box's corner on."""
    drawn = image.clone()
    x, y = box[:2].long().tolist()
    place = drawn[:, y : y + surface.shape[1], x : x + surface.shape[2]]
    charts, u, v = surface[:, : place.shape[1], : place.shape[2]].float()
    over = SURFACE_OPACITY * surface_colours(charts, u / 255, v / 255)
    blend = (over + (1 - SURFACE_OPACITY) * place).round().to(torch.uint8)
    place[:] = torch.where(charts > 0, blend, place)
    return drawn


def _draw_points(image: Tensor, points: Tensor) -> Tensor:
    """The image with a dot at each of the points (P, 5)."""
    picture = to_pil_image(image)
    pen = ImageDraw.Draw(picture)
    radius = _stroke(image) + 0.5
    shades = surface_colours(*points[:, 2:].unbind(1)).T.tolist()
    for (x, y), shade in zip(points[:, :2].tolist(), shades, strict=True):
        corners = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(corners, fill=tuple(shade), outline=(0, 0, 0))
    return pil_to_tensor(picture)


def draw_labels(
    image: Tensor,
    labels: np.ndarray,
    classes: Sequence[str],
    shades: Sequence[Colour] | None = None,
) -> Tensor:
    """The image with the classes of a label map over it, and each class's name on its largest part.

    A class called background, and what is `IGNORED`, is left as it is. `shades`: of the classes.
    """
    found = [c for c in np.unique(labels).tolist() if c != IGNORED and classes[c] != "background"]
    if not found:
        return image
    masks = torch.from_numpy(np.stack([labels == index for index in found]))
    shades = shades or palette(classes)
    colours = [shades[index] for index in found]
    image = utils.draw_segmentation_masks(image, masks, LABEL_MAP_OPACITY, colours)
    places = np.array([2 * _inside(mask.numpy()) for mask in masks])  # boxes of one point
    return _write(image, places, [classes[c] for c in found], colours)


def draw_depth(image: Tensor, depths: np.ndarray) -> Tensor:
    """The depths (H, W) in metres as colours: near ones red, far ones blue, on one scale always.

    Where there is none, the image is left as it is.
    """
    nearness = 255 * (1 - np.clip(depths / FARTHEST_SHOWN, 0, 1))
    shades = cv2.applyColorMap(np.rint(nearness).astype(np.uint8), cv2.COLORMAP_TURBO)
    colours = torch.from_numpy(shades[:, :, ::-1].copy()).permute(2, 0, 1)  # of OpenCV: BGR
    return torch.where(torch.from_numpy(depths > 0), colours, image)


def _inside(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of a pixel of the mask near its middle."""
    rows, columns = np.nonzero(mask)
    middle = np.median(rows), np.median(columns)
    nearest = np.argmin((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2)
    return float(columns[nearest]), float(rows[nearest])


def _stroke(image: Tensor) -> int:
    return max(2, round(max(image.shape[1:]) / 400))


def _write(
    image: Tensor, boxes: np.ndarray, texts: Sequence[str], colours: Sequence[Colour]
) -> Tensor:
    """Write each object's text, on a plate of its colour, where it hides no object.

    A text without such a place is left out: the box has the class's colour.
    """
    picture = to_pil_image(image)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, round(max(picture.size) / 75)))
    labels = Labels(boxes, picture.size)
    for box, text, shade in zip(boxes.tolist(), texts, colours, strict=True):
        _, _, right, bottom = font.getbbox(text)
        plate = labels.place((right + 4, bottom + 3), box)
        if plate is None:
            continue
        x0, y0, x1, y1 = plate
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=shade)  # Pillow's corners are both inside
        pen.text((x0 + 2, y0), text, fill=ink(shade), font=font)
    return pil_to_tensor(picture)


def contact_sheet(
    pictures: Sequence[Tensor], cell: int = 480, names: Sequence[str] | None = None
) -> Tensor:
    """All pictures on one, each at most `cell` pixels long and high, in a grid about square.

    `names` are written below them.
    """
    shrunk = []
    for index, picture in enumerate(pictures):
        small = to_pil_image(picture)
        small.thumbnail((cell, cell))
        shrunk.append(_captioned(small, names[index]) if names else pil_to_tensor(small))
    height = max(picture.shape[1] for picture in shrunk)
    width = max(picture.shape[2] for picture in shrunk)
    padded = [pad(p, [0, 0, width - p.shape[2], height - p.shape[1]], fill=255) for p in shrunk]
    columns = math.ceil(math.sqrt(len(shrunk) * height / width))
    return utils.make_grid(padded, nrow=columns, padding=4, pad_value=255)


def _captioned(picture: Image.Image, name: str, height: int = 16) -> Tensor:
    """The picture with its name below it; of a long one the end, where names differ."""
    sheet = Image.new("RGB", (picture.width, picture.height + height), "white")
    sheet.paste(picture)
    font = ImageFont.load_default(11)
    name = one_line(name)
    while len(name) > 4 and font.getlength(name) > picture.width:
        name = f"...{name[4:]}"
    ImageDraw.Draw(sheet).text((1, picture.height), name, fill="black", font=font)
    return pil_to_tensor(sheet)
