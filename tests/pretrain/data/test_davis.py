"""DAVIS' layout: what is wrong with it is told in a line each, before any work."""

import os

import numpy as np
import pytest
from PIL import Image
from tiny_davis import write_mask, write_tiny_davis

from moco_det.common.errors import UserError
from pretrain.data.davis import Davis, read_mask


@pytest.fixture
def root(tmp_path):
    return write_tiny_davis(tmp_path / "davis", frames=3)


def test_videos_are_listed_with_frames_and_masks(root):
    first, second = Davis(root).videos()
    assert (first.name, second.name) == ("disc", "pair")
    assert [path.name for path in second.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert [path.parent for path in second.masks] == [root / "Annotations/480p/pair"] * 3
    assert np.unique(read_mask(second.masks[0])).tolist() == [0, 1, 2]


def test_lists_have_what_editors_add_and_names_any_bytes(root):
    for kind in ("JPEGImages", "Annotations"):
        parent = os.fsencode(root / kind / "480p")
        os.rename(parent + b"/pair", parent + b"/p\xff r")
    (root / "ImageSets/2017/val.txt").write_bytes(b"\xef\xbb\xbfdisc\r\n\r\np\xff r \r\n")
    names = [os.fsencode(video.name) for video in Davis(root).videos()]
    assert names == [b"disc", b"p\xff r"]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


BROKEN = {
    "no list": (
        lambda root: (root / "ImageSets/2017/val.txt").unlink(),
        "no list .*val.txt: download DAVIS-2017-trainval-480p.zip",
    ),
    "empty list": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"),
        "val.txt lists no sequence",
    ),
    "twice": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text("disc\ndisc\n"),
        "lists disc 2 times",
    ),
    "elsewhere": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text("../disc\n"),
        "lists '../disc', which is no name",
    ),
    "no folder": (
        lambda root: (root / "ImageSets/2017/val.txt").write_text("bear\n"),
        "lists bear, but there is no .*JPEGImages/480p/bear",
    ),
    "no mask": (
        lambda root: (root / "Annotations/480p/disc/00001.png").unlink(),
        "disc: frame 00001 has no mask; expected in .*Annotations/480p/disc",
    ),
    "no first mask": (
        lambda root: (root / "Annotations/480p/pair/00000.png").unlink(),
        "pair: frame 00000 has no mask",
    ),
    "no frame": (
        lambda root: (root / "JPEGImages/480p/disc/00002.jpg").unlink(),
        "has 2 frames, .* J and F need 3",
    ),
    "frame's size": (
        lambda root: Image.new("RGB", (30, 20)).save(root / "JPEGImages/480p/disc/00001.jpg"),
        "disc/00001.jpg is 30x20 pixels, the sequence's first frame 64x48",
    ),
    "mask's size": (
        lambda root: Image.new("L", (30, 20)).save(root / "Annotations/480p/disc/00002.png"),
        "disc/00002.png is 30x20 pixels, the sequence's first frame 64x48",
    ),
    "no image": (
        lambda root: (root / "JPEGImages/480p/disc/00001.jpg").write_bytes(b"frame"),
        "cannot read image .*00001.jpg",
    ),
    "colours": (
        lambda root: Image.new("RGB", (64, 48)).save(root / "Annotations/480p/disc/00000.png"),
        "Pillow's mode RGB: .* objects' numbers, not colours",
    ),
    "frame cut short": (
        lambda root: cut_short(root / "JPEGImages/480p/pair/00002.jpg"),
        "cannot read image .*pair/00002.jpg: truncated file",
    ),
    "later mask cut short": (
        lambda root: cut_short(root / "Annotations/480p/pair/00002.png"),
        "cannot read the label map .*pair/00002.png",
    ),
    "later mask of 16 bits": (
        lambda root: Image.fromarray(np.zeros((48, 64), np.uint16)).save(
            root / "Annotations/480p/disc/00001.png"
        ),
        "mask .*disc/00001.png is of Pillow's mode I;16",
    ),
    "empty mask": (
        lambda root: write_mask(
            root / "Annotations/480p/disc/00000.png", np.full((48, 64), 255, np.uint8)
        ),
        "has no object: there is nothing to follow",
    ),
    "a gap": (
        lambda root: write_mask(
            root / "Annotations/480p/disc/00000.png", np.eye(48, 64, dtype=np.uint8) * 3
        ),
        "has the objects 3: number them from 1 without a gap",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_one_line(root, case):
    spoil, message = BROKEN[case]
    spoil(root)
    with pytest.raises(UserError, match=message) as raised:
        Davis(root).videos()
    assert "\n" not in str(raised.value)


def test_all_problems_are_told_to_who_asks(root):
    for case in ("no mask", "mask's size", "a gap"):
        BROKEN[case][0](root)
    (root / "Annotations/480p/pair/00002.png").unlink()
    assert [kind for kind, _ in Davis(root).problems()] == ["frames", "frames"]
    (root / "Annotations/480p/disc/00001.png").write_bytes(
        (root / "Annotations/480p/disc/00000.png").read_bytes()
    )
    assert [kind for kind, _ in Davis(root).problems()] == ["size", "mask", "frames"]
