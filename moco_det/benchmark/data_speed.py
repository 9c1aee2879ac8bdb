"""What data costs: the path from an image file to two views, beside torchvision's with PIL."""

import random
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from moco_det.benchmark.speed import alternate
from moco_det.common.errors import UserError
from pretrain.data.augmentations import MoCoAugmentation, MoCoCrop
from pretrain.data.batched_augmentations import finished
from pretrain.data.images import ImageViews, collate_views
from pretrain.data.listing import find_images
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD

IMAGES = 200  # of those in the folder, at most

# -- from a file to two views ---------------------------------------------------------------------


def data_path(images: Path, image_size: int, rounds: int) -> dict[str, float]:
    """Median seconds per image on one core, decoding and two MoCo v2 views, alternated.

    Returns:
        "reference": torchvision + PIL; "cpu" and "device": ours with --augment-on, of the latter
        the part that is left to the loading processes.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    found = np.random.default_rng(0).permutation(find_images(images))[:IMAGES]
    transform = official_transform(image_size)

    def reference():
        for path in found:
            with open(images / path.decode(), "rb") as file:
                image = Image.open(file).convert("RGB")
            transform(image), transform(image)

    ours = {
        "cpu": _loading(images, found, MoCoAugmentation(image_size, aug_plus=True)),
        "device": _loading(images, found, MoCoCrop(image_size, aug_plus=True)),
    }
    seconds = alternate(ours | {"reference": reference}, rounds)
    return {name: value / len(found) for name, value in seconds.items()}


def _loading(folder: Path, paths: np.ndarray, augmentation: MoCoAugmentation):
    """What a loading process does to load each image once."""
    dataset = ImageViews(folder, paths, [augmentation] * 2, seed=0)

    def load():
        for index in range(len(dataset)):
            _, unreadable = dataset[0, index]
            if unreadable:
                raise UserError(f"unreadable image in --images: {unreadable[0]}")

    return load


def looks(image_size: int, batch_size: int, device: str, rounds: int) -> float:
    """Median seconds in which `device` gives the two views of `batch_size` images their looks."""
    rng = np.random.default_rng(0)
    crop = MoCoCrop(image_size, aug_plus=True)
    image = rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
    samples = [([crop(image, rng), crop(image, rng)], []) for _ in range(batch_size)]
    views, _ = collate_views(samples)
    on_gpu = device == "cuda"
    if on_gpu:
        views = [type(view)(*(part.pin_memory() for part in view)) for view in views]
    candidate = {"": lambda: [finished(view, torch.device(device)) for view in views]}
    return alternate(candidate, rounds, torch.cuda.synchronize if on_gpu else None)[""]


def official_transform(image_size: int) -> transforms.Compose:
    """MoCo v2's augmentation as torchvision on PIL images does it, to a normalised tensor."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in PIXEL_MEAN], [s / 255 for s in PIXEL_STD]),
        ]
    )
