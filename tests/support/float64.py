"""Float64 for code that asks for float32, so that a bound on rounding has room around it.

Two ways of computing the same thing differ by rounding, and by how much depends on the processor.
Training magnifies it: a few steps of a small network with batch normalisation made 1e-3 of
float32's 6e-8, by values on different sides of a ReLU, which is as much as a small mistake makes.
In float64 the same steps made 1e-13 of 1e-16.

As a command, `python float64.py SCRIPT ARGUMENT ...` runs a script so.
"""

import contextlib
import runpy
import sys
from pathlib import Path

import torch

# Of a tensor's norm. Rounding stays 10,000 times below it, and mistakes (another BN group, a lost
# gradient) are 10,000 times above it at least.
ROUNDING = 1e-9


@contextlib.contextmanager
def in_float64():
    """What is built and computed within is in float64, although it is told `float()`."""
    dtype, to_float32 = torch.get_default_dtype(), torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.Tensor.float = to_float32


def assert_equal_but_for_rounding(found: torch.Tensor, expected: torch.Tensor, name="") -> None:
    """Integers are equal; all else was computed in float64, and differs by rounding alone."""
    assert found.shape == expected.shape, name
    if not expected.is_floating_point():
        assert torch.equal(found, expected), name
        return
    assert found.dtype == expected.dtype == torch.float64, name
    difference = (found - expected).norm()
    assert difference <= ROUNDING * expected.norm(), f"{name}: {difference} of {expected.norm()}"


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if it were run by itself
    with in_float64():
        runpy.run_path(sys.argv[0], run_name="__main__")
