"""The augmentations of MoCo v1 and v2, done by OpenCV on uint8 arrays.

Each operation takes its parameters explicitly and follows torchvision's PIL operation of the same
name, which is what the papers' code ran, to within 2/255 in the mean (see test_augmentations.py).

Images are RGB arrays of shape (H, W, 3), uint8, throughout.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F


def resized_crop(image, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The window `height` x `width` at (`top`, `left`), resized to `size` x `size`, bilinear."""
    return resize(image[top : top + height, left : left + width], size, size)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear as PIL does it: the filter widens with the scale when the image shrinks.

    OpenCV has no such filter (INTER_LINEAR aliases, INTER_AREA is a box; both leave the 2/255 of
    PIL on real crops), so shrinking goes through torch's uint8 kernel, which has it.
    """
    if image.shape[0] <= height and image.shape[1] <= width:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(image, _linear_table(factor, 0.0))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey level, which PIL rounds to an integer."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.LUT(image, _linear_table(factor, (1.0 - factor) * mean))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, to_grayscale(image), 1.0 - factor, 0.0)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by `shift` of a full circle, in [-0.5, 0.5], on PIL's 8-bit hue scale."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # uint8 arithmetic wraps, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with `sigma` pixels; PIL's `GaussianBlur(radius)` means sigma by radius."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def horizontal_flip(image: np.ndarray) -> np.ndarray:
    return cv2.flip(image, 1)


def resize_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The evaluation view: short side to 256/224 of `size`, then the central `size` x `size`.

    An image whose short side is `size` already (CIFAR at 32) is not enlarged first, as is usual.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    if short != size:
        target = round(size * 256 / 224)
        height, width = (target * side // short for side in (height, width))
        image = resize(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)  # as torchvision rounds
    return image[top : top + size, left : left + size]


class MoCoAugmentation:
    """One random view of an image: MoCo v2's augmentation with `aug_plus`, else MoCo v1's.

    `color_strength` s belongs to `aug_plus`: its colour jitter is (0.8 s, 0.8 s, 0.8 s, 0.2 s) as
    in SimCLR (arXiv:2002.05709, A), where s is 1; MoCo v2 has half of it. `crop_min` is the least
    area of a crop, 0.2 of the image's in both papers and 0.08 in SimCLR.

    v1 (Sec. 3.3): crop, grayscale 0.2, colour jitter (0.4, 0.4, 0.4, 0.4), flip.
    v2 (Sec. 3):   crop, colour jitter (0.4, 0.4, 0.4, 0.1) with 0.8, grayscale 0.2, blur 0.5, flip.
    """

    def __init__(
        self, size: int, aug_plus: bool, color_strength: float = 0.5, crop_min: float = 0.2
    ):
        self.size = size
        self.aug_plus = aug_plus
        self.color_strength = color_strength
        self.crop_min = crop_min

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) -> (size, size, 3); every draw comes from `rng`."""
        window = draw_crop(image.shape[0], image.shape[1], rng, self.crop_min)
        image = resized_crop(image, *window, self.size)
        if self.aug_plus:
            if rng.random() < 0.8:
                image = color_jitter(
                    image, 0.8 * self.color_strength, 0.2 * self.color_strength, rng
                )
            if rng.random() < 0.2:
                image = to_grayscale(image)
            if rng.random() < 0.5:
                image = gaussian_blur(image, rng.uniform(0.1, 2.0))
        else:
            if rng.random() < 0.2:
                image = to_grayscale(image)
            image = color_jitter(image, 0.4, 0.4, rng)
        return horizontal_flip(image) if rng.random() < 0.5 else image


def draw_crop(
    height: int, width: int, rng: np.random.Generator, least: float = 0.2
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as torchvision's RandomResizedCrop draws it: `least` to 1 of the
    area.

    After ten draws that do not fit, the largest central window of an allowed ratio is taken.
    """
    ratio = 3 / 4, 4 / 3  # of width to height
    for _ in range(10):
        target = height * width * rng.uniform(least, 1.0)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def color_jitter(
    image: np.ndarray, strength: float, hue: float, rng: np.random.Generator
) -> np.ndarray:
    """torchvision's ColorJitter: four factors drawn uniformly, applied in random order.

    Args:
        strength: of brightness, contrast and saturation, which all the papers' settings vary alike.
        hue: strength of the hue.
    """
    steps = [
        (adjust_brightness, rng.uniform(1 - strength, 1 + strength)),
        (adjust_contrast, rng.uniform(1 - strength, 1 + strength)),
        (adjust_saturation, rng.uniform(1 - strength, 1 + strength)),
        (adjust_hue, rng.uniform(-hue, hue)),
    ]
    for i in rng.permutation(4):
        adjust, amount = steps[i]
        image = adjust(image, amount)
    return image


def _linear_table(scale: float, offset: float) -> np.ndarray:
    """The 256 values of clip(scale * x + offset)."""
    return np.clip(np.arange(256) * scale + offset, 0, 255).astype(np.uint8)
