"""Detections drawn on their image, as vector boxes over an embedded JPEG.

Boxes are (x0, y0, x1, y1) in pixels of the original image. What is right and what is wrong differs
in line style and in the label's first sign too, so that it is not left to colour alone.
"""

import base64
import html
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

SCORE_SHOWN = 0.3  # detections below this score are left out of the pictures
EMBEDDED_SIDE = 480  # pixels: longer images are reduced, for the sake of the report's size


@dataclass(frozen=True)
class Boxes:
    """`boxes` (N, 4) and `classes` (N,); `scores` (N,) in [0, 1] for detections only."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None


def matched(detections: Boxes, truth: Boxes, iou_threshold: float = 0.5) -> np.ndarray:
    """Which detections are right, (N,) bool: the rule of AP50.

    In descending order of score each takes the unclaimed true box of its class with the largest
    IoU, if that reaches `iou_threshold`; a second detection of one object is therefore wrong.
    """
    right = np.zeros(len(detections.boxes), bool)
    if not len(detections.boxes) or not len(truth.boxes):
        return right
    iou = box_iou(torch.as_tensor(detections.boxes), torch.as_tensor(truth.boxes)).numpy()
    iou[detections.classes[:, None] != truth.classes[None, :]] = -1.0
    for index in np.argsort(-detections.scores, kind="stable"):
        best = iou[index].argmax()
        if iou[index, best] >= iou_threshold:
            right[index] = True
            iou[:, best] = -1.0
    return right


def confident(detections: Boxes) -> Boxes:
    """Only the detections that the pictures show."""
    keep = detections.scores >= SCORE_SHOWN
    return Boxes(detections.boxes[keep], detections.classes[keep], detections.scores[keep])


def picture(path: Path, truth: Boxes, detections: Boxes, names: tuple[str, ...], label: str) -> str:
    """An `<svg>` of the image with the true boxes (dashed) and the shown detections (solid)."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    shown = confident(detections)
    right = matched(shown, truth)
    parts = [_embedded(image)]
    parts += [_rectangle(box, "truth") for box in truth.boxes]
    # The surest last, so that its label lies on top.
    for index in np.argsort(shown.scores, kind="stable"):
        style = "right" if right[index] else "wrong"
        sign = "" if right[index] else "✕ "
        text = f"{sign}{names[shown.classes[index]]} {shown.scores[index]:.0%}"
        parts.append(_rectangle(shown.boxes[index], style))
        parts.append(_tag(shown.boxes[index], text, style, width, height))
    described = html.escape(f"{label}: {in_words(shown, right, truth)}", quote=True)
    body = "".join(parts)
    box = f"0 0 {width} {height}"
    return f'<svg class="photo" role="img" viewBox="{box}" aria-label="{described}">{body}</svg>'


def in_words(shown: Boxes, right: np.ndarray, truth: Boxes) -> str:
    """For example "3 of 4 objects found, 1 false detection"."""
    false = int((~right).sum())
    plural = "" if false == 1 else "s"
    return (
        f"{int(right.sum())} of {len(truth.boxes)} objects found, {false} false detection{plural}"
    )


def _embedded(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    scale = EMBEDDED_SIDE / max(height, width)
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    data = base64.b64encode(jpeg.tobytes()).decode("ascii")
    return f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/>'


def _rectangle(box: np.ndarray, style: str) -> str:
    x0, y0, x1, y1 = (float(v) for v in box)
    at = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
    return f'<rect class="halo" {at}/><rect class="{style}" {at}/>'


def _tag(box: np.ndarray, text: str, style: str, width: int, height: int) -> str:
    """The label above its box, or inside its upper edge, and always within the image."""
    size = max(width, height) / 20
    breadth = (0.53 * len(text) + 0.6) * size
    x = min(max(float(box[0]), 0.0), max(width - breadth, 0.0))
    y = float(box[1]) - 1.25 * size
    y = y if y >= 0 else max(float(box[1]), 0.0)
    return (
        f'<rect class="plate {style}" x="{x:.1f}" y="{y:.1f}" width="{breadth:.1f}"'
        f' height="{1.25 * size:.1f}"/>'
        f'<text class="tag" x="{x + 0.3 * size:.1f}" y="{y + 0.95 * size:.1f}"'
        f' font-size="{size:.1f}" textLength="{breadth - 0.6 * size:.1f}"'
        f' lengthAdjust="spacingAndGlyphs">{html.escape(text)}</text>'
    )
