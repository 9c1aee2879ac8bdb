"""Run-length encoded masks of files: whether they are whole, before pycocotools is handed one.

The tool checks nothing: it decodes runs beyond a mask's end, and allocates what the size says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def rle_problem(shape: Mapping[str, Any], size: Sequence[int] | None = None) -> str | None:
    """What is wrong with an RLE, compressed or not, to be read after "a mask"; None for nothing.

    Args:
        shape: {"size": [height, width], "counts": runs, or their code}.
        size: the (height, width) that it is to have; None for any.
    """
    found, counts = shape.get("size"), shape.get("counts")
    if not (isinstance(found, list | tuple) and len(found) == 2 and _are_whole(found)):
        return "without a size of [height, width]"
    if size is not None and tuple(found) != tuple(size):
        return f"of (height, width) {list(found)}; its image has {list(size)}"
    if isinstance(counts, list):
        whole = _are_whole(counts) and sum(counts) == found[0] * found[1]
    else:
        whole = is_whole(shape)
    return None if whole else "whose runs do not make up its size"


def _are_whole(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def compressed(shape: dict[str, Any]) -> dict[str, Any]:
    """An RLE without problem in its compressed form."""
    if not isinstance(shape["counts"], list):
        return shape
    return coco_mask.frPyObjects(shape, *shape["size"])


def is_whole(shape: Mapping[str, Any]) -> bool:
    """Whether the runs of a compressed RLE add up to its size."""
    try:
        (height, width), counts = shape["size"], shape["counts"]
        code = counts.encode("ascii") if isinstance(counts, str) else counts
    except (KeyError, TypeError, ValueError):
        return False
    if not isinstance(code, bytes):
        return False
    found = runs(code)
    return len(found) > 0 and found.min() >= 0 and int(found.sum()) == height * width


def runs(code: bytes) -> np.ndarray:
    """The run lengths of a compressed RLE, int64; empty where `code` is none.

    A number is five bits a character, the lowest first, 32 marking that more follow; the last has
    its sign in bit 16. From the fourth on it is the difference from the run but one before.
    """
    bits = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    last = (bits & 32) == 0
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or not last[-1]:
        return np.empty(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    shift = 5 * (np.arange(len(bits)) - np.repeat(starts, np.diff(starts, append=len(bits))))
    if shift.max() > 50:
        return np.empty(0, np.int64)
    values = np.add.reduceat((bits & 31) << shift, starts)
    values -= np.where(bits[last] & 16, 1 << (shift[last] + 5), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
