"""DAVIS 2017: video sequences with a mask of numbered objects for each frame.

    DATA/ImageSets/2017/val.txt                 a sequence's name in each line
    DATA/JPEGImages/480p/SEQUENCE/00000.jpg     its frames
    DATA/Annotations/480p/SEQUENCE/00000.png    0 background, 1 to N objects, 255 void

All that can be wrong is told before any frame is encoded; the data doctor asks for all of it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from moco_det.common.errors import UserError, one_line
from moco_det.common.files import evenly_spaced
from moco_det.common.images import (
    UnreadableImage,
    check_image,
    image_size,
    read_bytes,
    read_image,
    read_label_map,
)
from pretrain.data.listing import read_lines

VOID = 255  # of a mask: counts as background
SOURCE = (
    "download DAVIS-2017-trainval-480p.zip from davischallenge.org/davis2017/code.html; DATA is "
    "the folder DAVIS that it unpacks to"
)
OFFICIAL = {"train": 60, "val": 30}  # sequences of the official lists
FEWEST = 3  # frames: neither the first, which is given, nor the last is measured


@dataclass(frozen=True)
class Video:
    """A sequence: its frames in their order, and a mask for each."""

    name: str
    frames: list[Path]
    masks: list[Path]


@dataclass(frozen=True)
class Davis:
    """The sequences of one list of DAVIS 2017 in a folder of its layout."""

    root: Path
    split: str = "val"

    @property
    def list_file(self) -> Path:
        return self.root / "ImageSets" / "2017" / f"{self.split}.txt"

    def folders(self, name: str) -> tuple[Path, Path]:
        """Those of a sequence's frames and masks."""
        return tuple(self.root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))

    def videos(self) -> list[Video]:
        """All sequences, in the list's order.

        Raises:
            UserError: the first problem.
        """
        for _, text in self.problems():
            raise UserError(text)
        return [self.video(name) for name in self.names()]

    def video(self, name: str) -> Video:
        frames, masks = self.folders(name)
        return Video(name, sorted(frames.glob("*.jpg")), sorted(masks.glob("*.png")))

    def names(self) -> list[str]:
        """Raises UserError where the list cannot be read."""
        if not self.list_file.is_file():
            raise UserError(f"no list {self.list_file}: {SOURCE}")
        return read_lines(self.list_file)

    def count_objects(self, videos: list[Video]) -> int:
        """Those of the first masks, which J and F are measured of."""
        return sum(len(objects_of(video)) for video in videos)

    def decode(self, videos: list[Video], limit: int | None) -> tuple[int, list[str]]:
        """Decode frames at equal distances; how many, and what is wrong with them."""
        frames = evenly_spaced([path for v in videos for path in v.frames], limit)
        wrong = []
        for path in frames:
            try:
                read_image(path)
            except UnreadableImage as error:
                wrong.append(str(error))
        return len(frames), wrong

    def problems(self) -> Iterator[tuple[str, str]]:
        """(kind, text) of whatever is wrong, of all sequences."""
        try:
            names = self.names()
        except UserError as error:
            yield "layout", str(error)
            return
        if not names:
            yield "list", f"{self.list_file} lists no sequence: {SOURCE}"
        for name, times in Counter(names).items():
            if times > 1:
                yield "list", f"{self.list_file} lists {one_line(name, 60)} {times} times"
            if Path(name).name != name:  # masks are written to folders of these names
                yield "list", f"{self.list_file} lists {one_line(name, 60)!r}, which is no name"
            else:
                yield from self._problems_of(name)

    def _problems_of(self, name: str) -> Iterator[tuple[str, str]]:
        missing = [folder for folder in self.folders(name) if not folder.is_dir()]
        if missing:
            yield "layout", f"{self.list_file} lists {name}, but there is no {missing[0]}: {SOURCE}"
            return
        video = self.video(name)
        if len(video.frames) < FEWEST:
            text = f"{self.folders(name)[0]} has {len(video.frames)} frames, *.jpg; J and F need"
            yield "frames", f"{text} {FEWEST}, since the first and the last are left out"
        frames, masks = ({path.stem for path in paths} for paths in (video.frames, video.masks))
        for stem in sorted(frames ^ masks):
            of, lacks = ("frame", "mask") if stem in frames else ("mask", "frame")
            folder = self.folders(name)[lacks == "mask"]
            yield "frames", f"{name}: {of} {stem} has no {lacks}; expected in {folder}"
        if frames == masks and frames:
            yield from _size_problems(video)
            yield from _first_mask_problems(video)


def _size_problems(video: Video) -> Iterator[tuple[str, str]]:
    """Files that are cut short or cannot be read, or are of another size than the first frame.
    Masks are decoded, which takes seconds of a run of hours."""
    first = None
    for path in (*video.frames, *video.masks):
        try:
            if path in video.masks[1:]:  # the first one is read below
                height, width = read_mask(path).shape
            else:
                check_image(read_bytes(path), str(path))
                height, width = image_size(path)
        except UnreadableImage as error:
            yield "image", str(error)
            continue
        except UserError as error:
            yield "mask", str(error)
            continue
        first = first or (height, width)
        if (height, width) != first:
            wanted = f"{first[1]}x{first[0]}"
            yield "size", f"{path} is {width}x{height} pixels, the sequence's first frame {wanted}"


def _first_mask_problems(video: Video) -> Iterator[tuple[str, str]]:
    """Objects are those of the first mask, numbered from 1 without a gap: J and F count on it."""
    try:
        objects = objects_of(video)
    except UserError as error:
        yield "mask", str(error)
        return
    if not objects:
        yield "mask", f"{video.masks[0]} has no object: there is nothing to follow"
    elif objects != list(range(1, len(objects) + 1)):
        said = one_line(", ".join(map(str, objects)), 60)
        yield "mask", f"{video.masks[0]} has the objects {said}: number them from 1 without a gap"


def objects_of(video: Video) -> list[int]:
    """The numbers of the first mask's objects. Raises UserError where it cannot be read."""
    numbers = np.unique(read_mask(video.masks[0])).tolist()
    return [number for number in numbers if number not in (0, VOID)]


def read_mask(path: Path) -> np.ndarray:
    """uint8 H x W: an object's number for each pixel. Raises UserError."""
    mode, mask = read_label_map(path)
    if mode not in ("P", "L"):
        raise UserError(
            f"mask {path} is of Pillow's mode {mode}: it needs one channel of 8 bits (mode P or L) "
            "that holds the objects' numbers, not colours"
        )
    return mask


def palette_of(path: Path) -> list[int] | None:
    """R, G, B for each number, as a mask has them; None for a grey one."""
    with Image.open(path) as image:
        return image.getpalette()
