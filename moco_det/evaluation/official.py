"""The official tools of LVIS and Cityscapes, which are optional and older than today's NumPy.

`lvis` calls np.float, which left NumPy with 1.24, and cityscapesscripts np.in1d, which left it with
2.4; both stop with an AttributeError. `old_numpy` puts a stand-in that has these names in the place
of `np` in the one module that asks for them, while a call runs; NumPy itself is not touched, and
nothing stays changed. What the names do is what they did, so the metrics are the official ones.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np


class _OldNumPy:
    """NumPy with the names that the tools miss."""

    float = float

    @staticmethod
    def in1d(elements: np.ndarray, values) -> np.ndarray:
        return np.isin(elements, values).ravel()

    def __getattr__(self, name: str):
        return getattr(np, name)


@contextlib.contextmanager
def old_numpy(module: ModuleType) -> Iterator[None]:
    """While open, `np` in `module` also has the names that NumPy has dropped."""
    module.np = _OldNumPy()
    try:
        yield
    finally:
        module.np = np
