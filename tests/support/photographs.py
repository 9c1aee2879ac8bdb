"""An image that is like a photograph where none is at hand."""

import cv2
import numpy as np


def synthetic_photograph() -> np.ndarray:
    """Smooth shading, edges and fine texture: 300 x 400."""
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.uniform(0, 255, (6, 8, 3)), (400, 300), interpolation=cv2.INTER_CUBIC)
    image = np.clip(coarse + rng.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8)
    cv2.circle(image, (150, 120), 70, (200, 40, 90), -1)
    return image
