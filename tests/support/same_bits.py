"""Comparison of checkpoints to the last bit."""

import torch


def assert_same_bits(one, two, path="checkpoint"):
    """Every tensor and value of two nested checkpoints is equal, bit for bit."""
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, path
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            if key not in ("output", "resume"):  # flags that the two commands differ in
                assert_same_bits(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same_bits(a, b, f"{path}/{i}")
    else:
        assert one == two, path
