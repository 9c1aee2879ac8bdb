"""Run lengths that make up a mask, and those that do not."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from moco_det.datasets.coco_annotations import compressed, rle_problem

MASK = np.asfortranarray(np.eye(4, 5, dtype=np.uint8))
CODE = coco_mask.encode(MASK)


def test_whole_masks_in_both_forms():
    runs = np.diff(np.flatnonzero(np.diff(MASK.ravel(order="F"), prepend=0, append=2)), prepend=0)
    plain = {"size": [4, 5], "counts": runs.tolist()}
    assert rle_problem(plain, (4, 5)) is rle_problem(CODE, (4, 5)) is None
    assert compressed(plain) == compressed(CODE) == CODE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"size": None}, "without a size"),
        ({"size": [4, -5]}, "without a size"),
        ({"size": [4, 5.0]}, "without a size"),
        ({"size": [5, 4]}, r"of (height, width) [5, 4]; its image has [4, 5]"),
        ({"counts": [1, 2]}, "whose runs do not make up its size"),
        ({"counts": ["20"]}, "whose runs do not make up its size"),
        ({"counts": 10**12}, "whose runs do not make up its size"),  # no room is made for them
        ({"counts": None}, "whose runs do not make up its size"),
        ({"counts": "é"}, "whose runs do not make up its size"),
    ],
)
def test_broken_masks(change, problem):
    assert rle_problem(CODE | change, (4, 5)).startswith(problem)
