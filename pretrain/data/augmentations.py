"""The augmentations of MoCo v1 and v2, done by OpenCV on uint8 arrays.

Each operation takes its parameters explicitly and follows torchvision's PIL operation of the same
name, which is what the papers' code ran, to within 2/255 in the mean (see test_augmentations.py).

A view is drawn first, all of it, and then made: `MoCoAugmentation.draw` knows the size of the image
alone, so that a JPEG can be decoded no larger than its views need it, and so that a batch of crops
can get its colours, blur and flips on another device (`batched_augmentations.py`). How the views of
an image are drawn together is `multi_crop.py`'s.

Images are RGB arrays of shape (H, W, 3), uint8, throughout.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import AutoAugment

from pretrain.data.crops import Window, draw_crop

# A crop of a JPEG that is decoded smaller has so many times the pixels of its view's side: the
# mean difference to a whole decoding is then 1/255 to 1.5/255, and would be 2/255 without.
OVERSAMPLING = 1.25


def resized_crop(image, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The window `height` x `width` at (`top`, `left`), resized to `size` x `size`, bilinear."""
    return resize(image[top : top + height, left : left + width], size, size)


def resized_crop_of_reduced(
    image: np.ndarray, window: Window, size: int, reduction: int
) -> np.ndarray:
    """`resized_crop` of an image that was decoded at 1/`reduction`; the window is the whole one's.

    Its edges fall between two pixels here, which Pillow's filter can do.
    """
    top, left, height, width = (side / reduction for side in window)
    bottom, right = min(top + height, image.shape[0]), min(left + width, image.shape[1])
    whole = Image.fromarray(image)
    return np.asarray(whole.resize((size, size), Image.BILINEAR, (left, top, right, bottom)))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear as PIL does it: the filter widens with the scale when the image shrinks.

    OpenCV has no such filter (INTER_LINEAR aliases, INTER_AREA is a box; both leave the 2/255 of
    PIL on real crops), so shrinking goes through torch's uint8 kernel, which has it.
    """
    if image.shape[0] <= height and image.shape[1] <= width:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # Copied first: the kernel takes twice as long on a window of rows. It gives three planes.
    pixels = torch.from_numpy(image).contiguous().permute(2, 0, 1)[None]
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return cv2.merge(tuple(pixels[0].numpy()))


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


class Look(NamedTuple):
    """All that is drawn of a view beside its crop; each a number, or N numbers of N views.

    Args:
        gray_first, gray_last: whether it becomes gray, before the colour jitter or after it.
        jitter: whether the colour jitter is applied at all.
        brightness, contrast, saturation: factors.
        hue: a share of a full circle, in [-0.5, 0.5].
        first, second, third, fourth: which of these four is applied when, by its number from 0 on.
        sigma: of the blur, in pixels; 0 for none.
        flip: whether left and right are exchanged.
    """

    gray_first: float = False
    jitter: float = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    first: float = 0
    second: float = 1
    third: float = 2
    fourth: float = 3
    gray_last: float = False
    sigma: float = 0.0
    flip: float = False

    @property
    def order(self) -> tuple[float, ...]:
        """Of brightness 0, contrast 1, saturation 2 and hue 3."""
        return self.first, self.second, self.third, self.fourth


class View(NamedTuple):
    """One view as it is drawn, before there are pixels.

    Args:
        window: the crop.
        look: what follows the crop; neutral where `policy` stands in its place.
        policy: seed of AutoAugment's draws; None for a view without it.
        mirrored: whether left and right are exchanged before AutoAugment.
    """

    window: Window
    look: Look
    policy: int | None = None
    mirrored: bool = False


class CroppedView(NamedTuple):
    """A crop that still lacks its look, or a batch of them.

    Args:
        pixels: (S, S, 3) or (N, S, S, 3), uint8.
        look: float32, the numbers of a `Look`, (13,) or (N, 13).
    """

    pixels: np.ndarray | torch.Tensor
    look: np.ndarray | torch.Tensor


class MoCoAugmentation:
    """One random view of an image: MoCo v2's augmentation with `aug_plus`, else MoCo v1's.

    `color_strength` s belongs to `aug_plus`: its colour jitter is (0.8 s, 0.8 s, 0.8 s, 0.2 s) as
    in SimCLR (arXiv:2002.05709, A), where s is 1; MoCo v2 has half of it. A crop has `crop_min` to
    `crop_max` of the image's area: 0.2 to 1 in both papers, 0.08 to 1 in SimCLR, 0.05 to 0.14 for
    small crops (arXiv:2106.05967, Sec. 4.1).

    v1 (Sec. 3.3): crop, grayscale 0.2, colour jitter (0.4, 0.4, 0.4, 0.4), flip.
    v2 (Sec. 3):   crop, colour jitter (0.4, 0.4, 0.4, 0.1) with 0.8, grayscale 0.2, blur 0.5, flip.

    With probability `strong` a flip and AutoAugment's ImageNet policy, as torchvision has it, take
    the place of all that follows the crop (arXiv:2106.05967, Sec. 4.2).
    """

    def __init__(
        self,
        size: int,
        aug_plus: bool,
        color_strength: float = 0.5,
        crop_min: float = 0.2,
        crop_max: float = 1.0,
        strong: float = 0.0,
    ):
        self.size = size
        self.aug_plus = aug_plus
        self.color_strength = color_strength
        self.crop_min = crop_min
        self.crop_max = crop_max
        self.strong = strong

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) -> (size, size, 3); every draw comes from `rng`."""
        return self.view(image, self.draw(image.shape[0], image.shape[1], rng))

    def draw(self, height: int, width: int, rng: np.random.Generator) -> View:
        """A view of an image of that size."""
        window = draw_crop(height, width, rng, self.crop_min, self.crop_max)
        return self.draw_look(window, rng)

    def draw_look(self, window: Window, rng: np.random.Generator) -> View:
        """A view whose crop is drawn already."""
        if self.strong and rng.random() < self.strong:
            return View(window, Look(), int(rng.integers(2**63)), rng.random() < 0.5)
        if self.aug_plus:
            strengths = 0.8 * self.color_strength, 0.2 * self.color_strength
            look = draw_jitter(*strengths, rng) if rng.random() < 0.8 else Look()
            look = look._replace(gray_last=rng.random() < 0.2)
            if rng.random() < 0.5:
                look = look._replace(sigma=rng.uniform(0.1, 2.0))
        else:
            gray = rng.random() < 0.2
            look = draw_jitter(0.4, 0.4, rng)._replace(gray_first=gray)
        return View(window, look._replace(flip=rng.random() < 0.5))

    def surplus(self, drawn: View) -> float:
        """How much smaller the image may be decoded for the view to be as good."""
        return min(drawn.window[2:]) / (self.size * OVERSAMPLING)

    def view(self, image: np.ndarray, drawn: View, reduction: int = 1) -> np.ndarray:
        """The view (size, size, 3) that was drawn of an image, decoded at 1/`reduction`."""
        return apply_look(self.crop(image, drawn, reduction), drawn.look)

    def crop(self, image: np.ndarray, drawn: View, reduction: int) -> np.ndarray:
        """The view but for its look: AutoAugment, which goes by single images, is done here."""
        if reduction == 1:
            crop = resized_crop(image, *drawn.window, self.size)
        else:
            crop = resized_crop_of_reduced(image, drawn.window, self.size, reduction)
        if drawn.policy is None:
            return crop
        return auto_augment(horizontal_flip(crop) if drawn.mirrored else crop, drawn.policy)


class MoCoCrop(MoCoAugmentation):
    """The same views without their looks, which `batched_augmentations.finished` gives them."""

    def view(self, image: np.ndarray, drawn: View, reduction: int = 1) -> CroppedView:
        """Pixels (size, size, 3) and look (13,)."""
        look = np.array(drawn.look, dtype=np.float32)
        return CroppedView(self.crop(image, drawn, reduction), look)


def draw_jitter(strength: float, hue: float, rng: np.random.Generator) -> Look:
    """torchvision's ColorJitter: four factors drawn uniformly, and the order of their use.

    Args:
        strength: of brightness, contrast and saturation, which all the papers' settings vary alike.
        hue: strength of the hue.
    """
    brightness, contrast, saturation = (rng.uniform(1 - strength, 1 + strength) for _ in range(3))
    shift = rng.uniform(-hue, hue)
    order = rng.permutation(4).tolist()
    return Look(False, True, brightness, contrast, saturation, shift, *order)


def apply_look(image: np.ndarray, look: Look) -> np.ndarray:
    """Colours, blur and flip of a crop (S, S, 3), as they were drawn."""
    if look.gray_first:
        image = to_grayscale(image)
    if look.jitter:
        image = color_jitter(image, look)
    if look.gray_last:
        image = to_grayscale(image)
    if look.sigma:
        image = gaussian_blur(image, look.sigma)
    return horizontal_flip(image) if look.flip else image


def color_jitter(image: np.ndarray, look: Look) -> np.ndarray:
    """Brightness, contrast, saturation and hue, in the order of `look`."""
    steps = [
        (adjust_brightness, look.brightness),
        (adjust_contrast, look.contrast),
        (adjust_saturation, look.saturation),
        (adjust_hue, look.hue),
    ]
    for number in look.order:
        adjust, amount = steps[number]
        image = adjust(image, amount)
    return image


_IMAGENET_POLICY = AutoAugment()


def auto_augment(image: np.ndarray, seed: int) -> np.ndarray:
    """torchvision's AutoAugment of the ImageNet policy (arXiv:1805.09501), as it is under `seed`.

    It draws from torch's global generator, which is left as it was found. Only the CPU's is seeded:
    `torch.manual_seed` would seed those of all GPUs as well.
    """
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        return np.asarray(_IMAGENET_POLICY(Image.fromarray(image)))
    finally:
        generator.set_state(before)


def _linear_table(scale: float, offset: float) -> np.ndarray:
    """The 256 values of clip(scale * x + offset)."""
    return np.clip(np.arange(256) * scale + offset, 0, 255).astype(np.uint8)
