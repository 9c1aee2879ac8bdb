"""The looks of a batch of crops, on whatever device trains: colours, blur and flips.

`finished` does to N crops at once what `augmentations.apply_look` does to one of them by OpenCV,
each with the numbers that were drawn for it. The loading workers are then left with reading,
decoding and cropping.

OpenCV's and Pillow's 8-bit arithmetic is followed, rounding after each operation, so that the
two ways differ by a grey level here and there (see test_batched_augmentations.py). Shapes do
not depend on what was drawn: an operation is computed for all crops and kept where it was drawn.
So nothing waits for the device, and the number of kernels is the same in every step.

Shape legend:
    N: crops of a batch     S: their side     x: pixels, float32 whole numbers 0..255, N x 3 x S x S
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_det.common.errors import one_line
from moco_det.common.processes import print_on_main
from pretrain.data.augmentations import CroppedView, Look

CHUNK = 64  # crops at a time, which bounds the memory: about 0.4 GiB at 224 pixels
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LARGEST_SIGMA = 2.0
REACH = math.ceil(3 * LARGEST_SIGMA)  # of the blur to either side, in pixels


@torch.no_grad()
def finished(
    view: Tensor | CroppedView, device: torch.device, apply: Callable | None = None
) -> Tensor:
    """uint8 N x S x S x 3 on `device`: a batch of views as it is, crops with their looks.

    Args:
        apply: of `compiled_looks`; None for `apply_looks`.
    """
    if not isinstance(view, CroppedView):
        return view.to(device, non_blocking=True)
    pixels = view.pixels.to(device, non_blocking=True)
    looks = view.look.to(device, non_blocking=True)
    with torch.autocast(device.type, enabled=False):
        chunks = zip(pixels.split(CHUNK), looks.split(CHUNK), strict=True)
        return torch.cat([(apply or apply_looks)(some, their) for some, their in chunks])


def compiled_looks() -> Callable[[Tensor, Tensor], Tensor]:
    """`apply_looks` in far fewer kernels; where there is no compiler a line, and as it is."""
    apply = torch.compile(apply_looks, dynamic=False)

    def attempt(pixels: Tensor, looks: Tensor) -> Tensor:
        nonlocal apply
        try:
            return apply(pixels, looks)
        except torch.OutOfMemoryError:
            raise  # not for want of a compiler
        except Exception as error:  # what a compiler and its drivers may raise is without end
            if apply is apply_looks:
                raise
            apply = apply_looks
            reason = one_line(getattr(error, "inner_exception", error), 160)
            print_on_main(f"the views' looks are not compiled: {reason}")
            return apply(pixels, looks)

    return attempt


def apply_looks(pixels: Tensor, looks: Tensor) -> Tensor:
    """uint8 N x S x S x 3, and the N x 13 numbers of their `Look`s -> the same crops with these."""
    look = Look(*(column.view(-1, 1, 1, 1) for column in looks.unbind(1)))  # N x 1 x 1 x 1 each
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = torch.where(look.gray_first > 0, luma(x), x)
    x = torch.where(look.jitter > 0, jittered(x, look), x)
    x = torch.where(look.gray_last > 0, luma(x), x)
    x = torch.where(look.sigma > 0, blurred(x, look.sigma), x)
    x = torch.where(look.flip > 0, x.flip(3), x)
    return x.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def luma(x: Tensor) -> Tensor:
    """ITU-R 601: N x 3 x S x S -> N x 1 x S x S."""
    red, green, blue = x.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.5).floor()


def jittered(x: Tensor, look: Look) -> Tensor:
    """Each crop's four operations in its own order.

    The hue costs as much as the others together, and is computed once: crops whose other operations
    are to come first have them in the three turns before it, the others in the three after it.
    """
    turns = look.order
    passed = torch.zeros_like(turns[0], dtype=torch.bool)  # whether the hue has had its turn
    for turn in turns[:3]:
        passed = passed | (turn == HUE)
        x = blended(x, torch.where(passed, HUE, turn), look)
    x = hue_turned(x, look.hue)
    passed = torch.zeros_like(passed)
    for turn, earlier in zip(turns[1:], turns[:3], strict=True):
        passed = passed | (earlier == HUE)
        x = blended(x, torch.where(passed, turn, HUE), look)
    return x


def blended(x: Tensor, turn: Tensor, look: Look) -> Tensor:
    """Brightness, contrast or saturation, whichever `turn` says of each crop; its hue is left.

    They blend a crop with black, with its mean grey level and with its gray version: one formula.
    The first two round down, as a table of bytes does.
    """
    gray = luma(x)
    mean = (gray.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    saturation = turn == SATURATION
    factor = torch.where(turn == BRIGHTNESS, look.brightness, 1.0)
    factor = torch.where(turn == CONTRAST, look.contrast, factor)
    factor = torch.where(saturation, look.saturation, factor)  # N x 1 x 1 x 1
    other = torch.where(saturation, gray, torch.where(turn == CONTRAST, mean, 0.0))
    offset = (1 - factor) * other + torch.where(saturation, 0.5, 0.0)  # N x 1 x S x S
    return torch.addcmul(offset, factor, x).clamp_(0, 255).floor_()


def hue_turned(x: Tensor, shift: Tensor) -> Tensor:
    """Through hue, saturation and value of 8 bits each, as OpenCV and Pillow do it.

    Args:
        shift: N x 1 x 1 x 1, a share of a full circle.
    """
    red, green, blue = x.split(1, dim=1)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    saturation = (255 * chroma / value.clamp(min=1) + 0.5).floor()
    sixth = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = (256 / 6 * sixth / chroma.clamp(min=1) + 0.5).floor()
    hue = (hue + (255 * shift).trunc()).remainder(256)

    # A channel is darkest, by saturation, where its place on the circle is opposite to the hue.
    place = torch.arange(5.0, 0.0, -2.0, device=x.device).view(3, 1, 1)  # 5, 3, 1
    sector = (6 / 255 * hue + place).remainder(6)  # N x 3 x S x S
    darker = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return (value - value * (saturation / 255) * darker).round()


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of each crop's own width, along the rows and then along the columns.

    Args:
        sigma: N x 1 x 1 x 1, at most LARGEST_SIGMA; below 0.1 stands for no blur.
    """
    batch, channels, height, width = x.shape
    sigma = sigma.view(-1, 1).clamp(min=0.1)
    offset = torch.arange(-REACH, REACH + 1, device=x.device)  # 13
    # OpenCV's window for 8 bits: the odd number next to 6 sigma + 1.
    reach = ((6 * sigma + 1).round() / 2).floor()
    kernel = (-(offset**2) / (2 * sigma**2)).exp() * (offset.abs() <= reach)  # N x 13
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = F.pad(x, (REACH,) * 4, mode="replicate").flatten(0, 1)[None]  # 1 x 3N x S' x S'
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=batch * channels)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=batch * channels)
    return (planes.view(batch, channels, height, width) + 0.5).floor().clamp(0, 255)
