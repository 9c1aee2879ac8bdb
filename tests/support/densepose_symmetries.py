"""A stand-in for the file of the body's symmetries, in which every entry can be told by hand."""

from pathlib import Path

import numpy as np
from scipy.io import savemat


def write_symmetries(path: Path) -> Path:
    """U becomes 1 - U, V becomes V / 2 + chart / 100: [chart - 1][V * 255, U * 255]."""
    step = np.arange(256) / 255
    u, v = np.empty((1, 24), dtype=object), np.empty((1, 24), dtype=object)
    for chart in range(1, 25):
        u[0, chart - 1] = np.tile(1 - step, (256, 1))
        v[0, chart - 1] = np.tile(step[:, None] / 2 + chart / 100, (1, 256))
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"U_transforms": u, "V_transforms": v})
    return path
