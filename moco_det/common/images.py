"""Image files, whoever wrote them: one checked reader for pretraining and detection.

    read_image     pixels as they are stored, which is what the papers' pretraining saw; by OpenCV
    decode_image   the same, of bytes that are read already
    EncodedImage   the same in two steps: a JPEG's size, then its pixels, if need be at a half of it
    read_upright   the image as a viewer shows it, on which boxes are drawn; by Pillow
    image_size     its height and width, from the header
    read_label_map the numbers of an image of labels, as they are stored

A reader opens regular files only. Before it decodes, it compares the size in the header with the
limit on pixels, and walks a JPEG's markers or a PNG's chunks to their end: what ends too early is
refused, what follows the end is ignored. Samples of 16 bits are scaled to 8. Samples without a
largest value, which are floats and integers of 32 bits, are refused, since they could be anything.
"""

import contextlib
import math
import os
import re
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from moco_det.common.errors import UserError, one_line
from moco_det.common.files import NotRegularFile, open_regular

UPRIGHT = {  # EXIF orientation -> what turns the stored pixels the right way up
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# 1/r of a JPEG's width and height: what its decoder can leave out of each block of 8x8 pixels.
REDUCTIONS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_ON_ITS_SIDE = 5  # and above: the stored rows are the columns of what is seen

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# All but those that a scan may hold (stuffed zeros, restarts) or that have no segment.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xef\xfe])")
_JPEG_END = 0xD9
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_BYTES_A_PIXEL = 8  # at most: four channels of 16 bits, not compressed


class UnreadableImage(UserError):
    """The file is no image, or not a whole one, or larger than allowed.

    Args:
        name: of the file, for messages.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # as `args`, by which a worker process hands it over
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


# -- the limit on pixels --------------------------------------------------------------------------


def allow_pixels(limit: float) -> None:
    """Read images of up to `limit` pixels in this process, and in those that it forks.

    The limit is Pillow's own, so that it holds for whatever else reads images by Pillow.
    """
    # Pillow refuses what has more than twice as many.
    Image.MAX_IMAGE_PIXELS = None if limit == math.inf else int(limit + 1) // 2
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def max_pixels() -> float:
    """The limit; without one, infinity."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def _too_large(what: str) -> str:
    return (
        f"{what}, which is more than {max_pixels():,} pixels: if you trust the file, raise "
        "--max-image-pixels or INPUT.MAX_IMAGE_PIXELS"
    )


# -- reading --------------------------------------------------------------------------------------


def read_image(path: str | Path) -> np.ndarray:
    """RGB uint8 (H, W, 3), as stored: EXIF orientation is ignored. Raises UnreadableImage."""
    return decode_image(read_bytes(path), str(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The content of an image file, as `read_image` gives it; `name` is for the message."""
    return check_image(data, name).decode()


def check_image(data: bytes, name: str) -> "EncodedImage":
    """The content of an image file, not decoded yet. Raises UnreadableImage."""
    return EncodedImage(data, name, _check(data, name))


@dataclass(frozen=True)
class EncodedImage:
    """Of `check_image`.

    `jpeg_size`: (height, width) of a JPEG, which can be decoded smaller than that; else None.
    """

    data: bytes
    name: str
    jpeg_size: tuple[int, int] | None

    def decode(self, reduction: int = 1) -> np.ndarray:
        """RGB uint8 (H, W, 3), as `read_image` gives it; of a JPEG 1/`reduction` of its sides,
        rounded up, where REDUCTIONS has it. Raises UnreadableImage."""
        image = None
        # In other formats OpenCV passes over a PGM's maximum and a float's missing one.
        if self.data.startswith((_JPEG, _PNG)):
            coded = np.frombuffer(self.data, dtype=np.uint8)
            flags = REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
            with contextlib.suppress(cv2.error):
                image = cv2.imdecode(coded, flags)
        if image is None:  # for OpenCV; Pillow may do without its limits, and says what is wrong
            decoded = _decode(self.data, self.name)
            return np.array(decoded if reduction == 1 else decoded.reduce(reduction))
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_upright(path: str | Path) -> Image.Image:
    """RGB, turned by its EXIF orientation. Raises UnreadableImage."""
    data, name = read_bytes(path), str(path)
    _check(data, name)
    return _decode(data, name, upright=True)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `read_upright` gives, from the header. Raises UnreadableImage."""
    with _open_file(path) as file, _open_image(file, str(path)) as image:
        size = image.height, image.width
        return size[::-1] if orientation(image) >= _ON_ITS_SIDE else size


def read_label_map(path: str | Path) -> tuple[str, np.ndarray]:
    """(Pillow's mode, pixels) of a label map, whole; `UserError` where it cannot be read."""
    try:
        with Image.open(BytesIO(read_bytes(path))) as image:
            return image.mode, np.array(image)
    except UnreadableImage as error:
        raise UserError(f"cannot read the label map {path}: {error.reason}") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on bad files
        reason = one_line(error, 120)
        raise UserError(f"cannot read the label map {path}: {reason}") from error


def label_colour(index: int) -> tuple[int, int, int]:
    """The colour map of VOC's label images: the bits of the index, dealt to R, G and B in turn."""
    bits = [[index >> (3 * level + channel) & 1 for level in range(3)] for channel in range(3)]
    return tuple(sum(bit << (7 - level) for level, bit in enumerate(row)) for row in bits)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright, and stands for tags that say nothing valid."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a malformed tag says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def read_bytes(path: str | Path) -> bytes:
    """What a regular file holds that can be an image. Raises UnreadableImage."""
    with _open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _BYTES_A_PIXEL * max_pixels():
            raise UnreadableImage(str(path), _too_large(f"a file of {size:,} bytes"))
        try:
            return file.read()
        except OSError as error:
            raise UnreadableImage(str(path), error.strerror) from error


def _open_file(path: str | Path) -> BinaryIO:
    try:
        return open_regular(path)
    except NotRegularFile as error:
        raise UnreadableImage(str(path), "not a regular file") from error
    except (OSError, ValueError) as error:  # a ValueError where there is a NUL in the name
        raise UnreadableImage(str(path), getattr(error, "strerror", "") or str(error)) from error


# -- checks ---------------------------------------------------------------------------------------


def _check(data: bytes, name: str) -> tuple[int, int] | None:
    """UnreadableImage for an empty file, a JPEG or PNG cut short, or one beyond the limit.

    Returns (height, width) of a JPEG whose header tells them.
    """
    if not data:
        raise UnreadableImage(name, "empty file")
    if data.startswith(_JPEG):
        size = _walk_jpeg(data)
    elif data.startswith(_PNG):
        size = _walk_png(data)
    else:
        return None
    if size is None:
        raise UnreadableImage(name, "truncated file")
    height, width = size
    if height * width > max_pixels():
        raise UnreadableImage(name, _too_large(f"{width}x{height}"))
    return size if data.startswith(_JPEG) and height * width > 0 else None


def _walk_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of its largest frame, if the end marker is reached: ITU-T T.81, annex B.

    A segment tells its length, so that the markers of a thumbnail in it are passed over. The scan
    after a segment ends where the next marker is.
    """
    size, place = (0, 0), len(_JPEG)
    while marker := _JPEG_MARKER.search(data, place):
        kind, place = marker[1][0], marker.end()
        if kind == _JPEG_END:
            return size
        if kind in _JPEG_FRAMES:  # length, precision, height, width
            frame = _big_endian(data, place + 3, 2), _big_endian(data, place + 5, 2)
            size = max(size, frame, key=math.prod)
        place += _big_endian(data, place, 2)
    return None


def _walk_png(data: bytes) -> tuple[int, int] | None:
    """(height, width), if the chunk IEND is reached and whole: length, type, content, CRC."""
    place = len(_PNG)
    while place + 12 <= len(data):
        kind = data[place + 4 : place + 8]
        place += 12 + _big_endian(data, place, 4)
        if kind == b"IEND" and place <= len(data):
            return _big_endian(data, 20, 4), _big_endian(data, 16, 4)
    return None


def _big_endian(data: bytes, place: int, count: int) -> int:
    return int.from_bytes(data[place : place + count], "big")


# -- Pillow ---------------------------------------------------------------------------------------


def _decode(data: bytes, name: str, upright: bool = False) -> Image.Image:
    with _open_image(BytesIO(data), name) as image:
        try:
            turn = UPRIGHT.get(orientation(image)) if upright else None
            decoded = _as_rgb(image)
            return decoded if turn is None else decoded.transpose(turn)
        except Exception as error:  # OSError, SyntaxError, struct.error, ... on bad files
            raise UnreadableImage(name, _one_line(error)) from error


def _open_image(file: BinaryIO, name: str) -> Image.Image:
    """The image of a file, its header read."""
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(name, _too_large("a large image")) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "not an image") from error
    except Exception as error:  # as above
        raise UnreadableImage(name, _one_line(error)) from error
    if image.format == "EPS":
        raise UnreadableImage(name, "a PostScript program, not an image")
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Of 16 bits the upper 8 are kept, as libpng and Pillow do it in colour images."""
    # Pillow's "I" has 32 bits; it stands for 16 where the format has no more.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} samples, whose range is not known: convert them to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    return one_line(error, 200) or type(error).__name__
