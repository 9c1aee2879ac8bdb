"""Predictions, the form in which both engines hand over what a model found.

A record is made from a model's output (`prediction_record`), kept in a file (`save_predictions`)
and, before it is scored, checked and turned into tensors (`checked`). N detections of an image, K
keypoints of each.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from moco_det.common.documents import read_json, shortened
from moco_det.common.errors import UserError, one_line
from moco_det.common.files import write_text
from moco_det.datasets import Dataset
from moco_det.datasets.coco_annotations import is_whole
from moco_det.datasets.depth import decode_depth, encode_depth
from moco_det.densepose.points import encode_iuv

MOST = 8 << 30  # bytes of a file of predictions
_LARGEST = 2.0**31  # pixels, or a score; what draws makes whole numbers of them
_TASK_OF = {"segmentations": "segm", "keypoints": "keypoints"}  # field of a prediction -> task


def prediction_record(image_id: int | str, output: dict[str, Tensor]) -> dict[str, Any]:
    """What a model found in one image, as it is saved and evaluated, on the CPU.

    Args:
        image_id: of the data set's record.
        output: {"boxes" (D, 4), "scores" (D,), "classes" (D,)}, and "masks" bool (D, H, W) in the
            original image, "keypoints" (D, K, 3) and "densepose", D of uint8 (3, h, w) in whole
            pixels of the boxes, where the model has them; or, of semantic segmentation, {"sem_seg"
            (C, H, W)}, the classes' scores; or {"depth" (H, W)} in metres.

    Returns:
        The same boxes, scores and classes; "segmentations", D compressed RLEs whose "counts" are
        strings, as JSON needs them; "keypoints"; "densepose", D of `encode_iuv`. Of semantic
        segmentation {"image_id", "sem_seg"}, one {"category_id", "segmentation"} for each class
        that is the best of some pixel. Of depth {"image_id", "depth"}; see `encode_depth`.
    """
    if "depth" in output:
        return {"image_id": image_id, "depth": encode_depth(output["depth"].cpu().numpy())}
    if "sem_seg" in output:
        best = output["sem_seg"].argmax(dim=0)
        present = best.unique()
        shapes = encode_masks(best == present[:, None, None])
        segments = zip(present.tolist(), shapes, strict=True)
        found = [{"category_id": label, "segmentation": shape} for label, shape in segments]
        return {"image_id": image_id, "sem_seg": found}
    record = {"image_id": image_id}
    # Cloned: Detectron2's evaluator moves the keypoints where they lie.
    for key in ("boxes", "scores", "classes", "keypoints"):
        if key in output:
            record[key] = output[key].detach().cpu().clone()
    if "masks" in output:
        record["segmentations"] = encode_masks(output["masks"])
    if "densepose" in output:
        record["densepose"] = [encode_iuv(surface.cpu().numpy()) for surface in output["densepose"]]
    return record


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Bool masks (D, H, W) to D compressed RLEs {"size": [H, W], "counts": str}."""
    shapes = []
    for mask in masks:
        shape = coco_mask.encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))
        shapes.append({**shape, "counts": shape["counts"].decode("ascii")})
    return shapes


def predictions_file(output_dir: str | Path, name: str) -> Path:
    """Where the predictions on data set `name` are: OUTPUT_DIR/inference/<name>.json.

    A folder named as a data set becomes a file name by `_` for all but letters, digits and `-`.
    """
    return Path(output_dir) / "inference" / f"{re.sub(r'[^A-Za-z0-9-]+', '_', name)}.json"


def save_predictions(output_dir: str, name: str, predictions: list[dict]) -> None:
    """Write the predictions on data set `name` to `predictions_file`, as a list.

    Raises:
        UserError: the file cannot be written.
    """
    path = predictions_file(output_dir, name)
    plain = [
        {key: value.tolist() if torch.is_tensor(value) else value for key, value in found.items()}
        for found in predictions
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plain))
    except OSError as error:
        raise UserError(f"cannot write detections to {path}: {error.strerror}") from error


def read_predictions(path: Path, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Image id, as text -> prediction: of objects as `checked` has it, {"sem_seg"} or {"depth"}.

    Raises:
        UserError: the file cannot be read, is none of predictions, or is of other classes.
    """
    try:
        found = read_json(path, "predictions", MOST, finite=False)
        if dataset.evaluator == "sem_seg":
            return {str(r["image_id"]): _checked_labels(r, len(dataset.classes)) for r in found}
        if dataset.evaluator == "depth":
            return {str(r["image_id"]): _checked_depth(r) for r in found}
        records = [checked(record, len(dataset.classes)) for record in found]
        for record in records:
            _refuse_impossible(record)
        return {str(record["image_id"]): record for record in records}
    except (ValueError, RuntimeError, OverflowError) as error:  # of torch: odd shapes and numbers
        reason = one_line(error, 120)
        raise UserError(f"cannot read predictions {shortened(path)}: {reason}") from error
    except (KeyError, TypeError, AttributeError) as error:
        kinds = {"sem_seg": "label maps", "depth": "depth maps"}
        kind = kinds.get(dataset.evaluator, "objects")
        raise UserError(
            f"{shortened(path)} does not hold predicted {kind} for {dataset.name}: no "
            f"{one_line(error, 60)}"
        ) from error


def _checked_labels(prediction: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """The prediction's "sem_seg" alone; ValueError for a class that is none, or a broken mask."""
    where = f"image {prediction['image_id']}"
    for segment in prediction["sem_seg"]:
        category = segment["category_id"]
        if type(category) is not int or not 0 <= category < num_classes:
            raise ValueError(f"{where}: a class is outside [0, {num_classes})")
        if not is_whole(segment["segmentation"]):
            raise ValueError(f"{where}: the runs of a mask do not make up its size")
    return {"sem_seg": prediction["sem_seg"]}


def _checked_depth(prediction: dict[str, Any]) -> dict[str, Any]:
    """The prediction's "depth" alone; ValueError for one that is broken."""
    try:
        decode_depth(prediction["depth"])
    except ValueError as error:
        raise ValueError(f"image {prediction['image_id']}: {error}") from error
    return {"depth": prediction["depth"]}


def _refuse_impossible(record: dict[str, Any]) -> None:
    """ValueError for a number that nothing in an image can have, or a box that ends too early."""
    for name, values in record.items():
        if torch.is_tensor(values) and not (values.abs() <= _LARGEST).all():  # nor is it of NaN
            raise ValueError(f"image {record['image_id']}: {name} are not all finite, or huge")
    boxes = record["boxes"]
    exchanged = (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    if exchanged.any():
        raise ValueError(f"image {record['image_id']}: {boxes[exchanged][0].tolist()} is no box")


def checked(prediction: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """The prediction with float64 and int64 tensors; see `moco_det.evaluation.evaluate`.

    Raises:
        ValueError: lengths, shapes or classes that do not fit; a broken mask.
    """
    found = {
        "image_id": prediction["image_id"],
        "boxes": torch.as_tensor(prediction["boxes"], dtype=torch.float64).reshape(-1, 4),
        "scores": torch.as_tensor(prediction["scores"], dtype=torch.float64),
        "classes": torch.as_tensor(prediction["classes"], dtype=torch.int64),
    }
    if "keypoints" in prediction:
        found["keypoints"] = torch.as_tensor(prediction["keypoints"], dtype=torch.float64)
    if "segmentations" in prediction:
        found["segmentations"] = list(prediction["segmentations"])
    if "densepose" in prediction:
        found["densepose"] = list(prediction["densepose"])
    where = f"image {found['image_id']}"
    fields = [key for key in found if key != "image_id"]
    if len({len(found[key]) for key in fields}) > 1:
        raise ValueError(f"{where}: {', '.join(f'{len(found[key])} {key}' for key in fields)}")
    if "keypoints" in found and len(found["boxes"]) and found["keypoints"].shape[2:] != (3,):
        raise ValueError(
            f"{where}: keypoints of shape {tuple(found['keypoints'].shape)}, not NxKx3"
        )
    classes = found["classes"]
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(f"{where}: a class is outside [0, {num_classes})")
    for shape in found.get("segmentations", ()):
        if not is_whole(shape):
            raise ValueError(f"{where}: the runs of a mask do not make up its size")
    for surface, box in zip(found.get("densepose", ()), found["boxes"].tolist(), strict=False):
        if not _fits(surface, box):
            raise ValueError(
                f"{where}: a dense pose of uv_shape {surface.get('uv_shape')} is not of the box "
                f"{box}, in whole pixels"
            )
    return found


def _fits(surface: dict[str, Any], box: list[float]) -> bool:
    """Whether a dense pose has the box's sides, rounded down to whole pixels and at least one.

    The sides may have been found in another precision, and so be rounded to the next pixel.
    """
    shape = surface.get("uv_shape", ())
    if len(shape) != 3 or shape[0] != 3:
        return False
    sides = max(box[3] - box[1], 1), max(box[2] - box[0], 1)
    return all(
        found >= 1 and -1.001 < found - side < 0.001
        for found, side in zip(shape[1:], sides, strict=True)
    )


def tasks_of(predictions: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """ "bbox", and "segm" and "keypoints" where the predictions have them.

    Raises:
        ValueError: some have them and some do not.
    """
    tasks = ["bbox"]
    tasks += [task for field, task in _TASK_OF.items() if have(predictions, field)]
    return tuple(tasks)


def have(predictions: Sequence[dict[str, Any]], field: str) -> bool:
    """Whether all predictions have the field, or none; ValueError where only some have it."""
    having = sum(field in prediction for prediction in predictions)
    if 0 < having < len(predictions):
        raise ValueError(f"{having} of {len(predictions)} predictions have {field}")
    return having > 0


def check_images(predictions: Sequence[dict[str, Any]], image_ids: Collection[int | str]) -> None:
    """ValueError for a prediction whose image is not among the data set's."""
    unknown = {prediction["image_id"] for prediction in predictions}.difference(image_ids)
    if unknown:
        shown = sorted(unknown, key=str)[:10]
        raise ValueError(f"predictions for images that are not in the data set: {shown}")


def check_masks(
    predictions: Sequence[dict[str, Any]], sizes: Mapping[int | str, tuple[int, int]]
) -> None:
    """`check_images`, and whether masks are of their images' size.

    The COCO API would count a mask of another size as one that overlaps nothing.

    Args:
        sizes: (height, width) by image id.

    Raises:
        ValueError: names the images, or the image and both sizes.
    """
    check_images(predictions, sizes)
    for prediction in predictions:
        size = sizes[prediction["image_id"]]
        for shape in prediction.get("segmentations", ()):
            if tuple(shape["size"]) != tuple(size):
                raise ValueError(
                    f"image {prediction['image_id']}: a mask is of size {list(shape['size'])}, "
                    f"the image of {list(size)} (height, width)"
                )
