"""A small weight file: its arrays, what else it holds, and whether arrays are the same."""

import torch

ARRAYS = {
    "stem.conv1.weight": torch.arange(6.0).reshape(2, 3),
    "stem.conv1.norm.num_batches_tracked": torch.tensor(7),  # no dimensions
}
METADATA = {"__author__": "MOCO", "matching_heuristics": True, "requires": {"A.B": [1]}}
FILE = {"model": ARRAYS} | METADATA


def assert_equal(weights, expected=ARRAYS):
    assert list(weights) == list(expected)
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value)
