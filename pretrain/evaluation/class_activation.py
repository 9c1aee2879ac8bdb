"""Class activation maps: where in an image a classifier sees a class (arXiv:1512.04150).

The logits of a linear layer behind global average pooling are means over places. Without the mean,
the layer gives each place of the last feature map its share of each class's logit.

Shape legend:
    D: channels of the last feature map     h, w: its height and width     C: classes
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from moco_det.common.errors import UserError, nearest
from pretrain.data.labelled import central_part
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.evaluation.classification import load_classifier
from pretrain.evaluation.features import extract
from pretrain.moco.encoders import build_encoder


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """D x h x w and C x D -> C x h x w, whose mean over the places is the logit less its bias."""
    return torch.einsum("dhw,cd->chw", features, weight)


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier of pretrain/linear.py, in evaluation mode.

    Args:
        encoder: ends with the classifier `fc`, D -> C.
        classes: C names.
        image_size: side of the crops that it was trained on.
    """

    encoder: nn.Module
    classes: list[str]
    image_size: int

    def explain(self, image: np.ndarray, wanted: str = "") -> tuple[str, float, Tensor]:
        """A class, its probability and its activation map h x w.

        The whole image is seen, its short side resized as for the evaluation, but not cropped.

        Args:
            image: uint8 (H, W, 3).
            wanted: the class; "" for the most probable one.
        """
        view = torch.from_numpy(resized(image, self.image_size))
        trunk = nn.Sequential(*list(self.encoder.children())[:-2])  # without pooling and fc
        features = extract(trunk, view[None])[0]
        fc = self.encoder.fc
        maps = class_activation_maps(features, fc.weight.detach())
        probabilities = (maps.mean(dim=(1, 2)) + fc.bias.detach()).softmax(dim=0)
        index = self.classes.index(wanted) if wanted else int(probabilities.argmax())
        return self.classes[index], float(probabilities[index]), maps[index]

    def check_class(self, name: str) -> None:
        """Raises UserError for a name that is none of the classes."""
        if name not in self.classes:
            near = nearest(name, self.classes)
            some = ", ".join(self.classes[:5])
            raise UserError(f"the classifier has no class {name}{near or f'; it has {some}, ...'}")


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image as `centre_crop` resizes it; an extremely long one's central part."""
    picture = Image.fromarray(central_part(image))
    if min(picture.size) != size:
        picture = TF.resize(picture, round(size * 256 / 224))
    return np.array(picture)


def load_image_classifier(path: Path) -> ImageClassifier:
    """The classifier of a run's checkpoint. Raises UserError for any other file."""
    checkpoint = Checkpoint(path, checkpoints.load_resumable(path))
    state, weights = checkpoint.state, checkpoints.weights(checkpoint.state)
    config, classes = state.get("config", {}), state.get("classes")
    fc = weights.get("fc.weight")
    if fc is None or fc.ndim != 2 or "arch" not in state:
        raise UserError(
            f"{path} is no classifier: pass a checkpoint of pretrain/linear.py, which trains one"
        )
    count = len(fc)
    if classes is None:  # of an earlier version
        classes = [str(number) for number in range(count)]
    if not isinstance(classes, list) or len(classes) != count:
        raise UserError(f"{path} has {count} outputs, and not a name for each of them")
    encoder = build_encoder(state["arch"], count, small_stem=bool(config.get("small_stem")))
    load_classifier(encoder, checkpoint, state["arch"])
    size = config.get("image_size", 224)
    if not (isinstance(size, int) and 1 <= size <= 10_000):
        raise UserError(f"{path}: config.image_size is {size!r}, not a number of pixels")
    return ImageClassifier(encoder.eval().requires_grad_(False), list(map(str, classes)), size)
