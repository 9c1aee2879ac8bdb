"""The views of an image, drawn together: the query's, the key's, small ones (arXiv:2106.05967)."""

from collections.abc import Sequence

import numpy as np
import torch

from pretrain.data.augmentations import MoCoAugmentation, View
from pretrain.data.crops import draw_crop, draw_crop_within, draw_pair, iou

QUERY, KEY = 0, 1  # the places of the two large views; small ones follow them
STRONG = {"none": 0.0, "autoaugment": 1.0, "mix": 0.5}  # share of the positives with AutoAugment
FREE = {"free_pairs": slice(KEY, KEY + 1), "free_crops": slice(KEY + 1, None)}  # of which views


class MultiCrop:
    """Draws the views of an image; the first two are those of `draw` of their augmentations.

    Args:
        augmentations: one for each view: the query's, the key's, then those of small crops. There
            may be the query's alone.
        share: of each small crop's area, at least, that lies within the key's crop (constrained
            multi-crop, Sec. 4.1); 0 for crops anywhere.
        ious: the least and the largest IoU of the query's and the key's crop (Sec. 3.1).
    """

    def __init__(
        self,
        augmentations: Sequence[MoCoAugmentation],
        share: float = 0.0,
        ious: tuple[float, float] = (0.0, 1.0),
    ):
        self.augmentations = list(augmentations)
        self.share = share
        self.ious = ious

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those of FREE whose crops have a condition to meet."""
        held = {"free_pairs": self.ious != (0.0, 1.0), "free_crops": self.share > 0}
        return tuple(name for name in FREE if held[name])

    def draw(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[list[View], list[bool]]:
        """The views of an image of that size, and for each whether its crop is a free one: it was
        to overlap another one, and the draws for it ran out."""
        views = [a.draw(height, width, rng) for a in self.augmentations[: KEY + 1]]
        free = [False] * len(views)
        if "free_pairs" in self.conditions:
            free[KEY] = not self._limit(views, height, width, rng)
        for augment in self.augmentations[KEY + 1 :]:
            area = augment.crop_min, augment.crop_max
            if self.share:
                anchor = views[KEY].window
                window, failed = draw_crop_within(height, width, rng, *area, anchor, self.share)
            else:
                window, failed = draw_crop(height, width, rng, *area), False
            views.append(augment.draw_look(window, rng))
            free.append(failed)
        return views, free

    def _limit(self, views: list[View], height: int, width: int, rng: np.random.Generator) -> bool:
        """Give the two views crops whose IoU is within the limits; False where none is found, and
        their crops stay as they are."""
        least, most = self.ious
        if least <= iou(views[QUERY].window, views[KEY].window) <= most:
            return True
        area = self.augmentations[KEY].crop_min, self.augmentations[KEY].crop_max
        pair = draw_pair(height, width, rng, *area, self.ious)
        if pair is None:
            return False
        views[:] = [view._replace(window=w) for view, w in zip(views, pair, strict=True)]
        return True


def free_shares(free_crops: torch.Tensor, conditions: tuple[str, ...]) -> torch.Tensor:
    """The share of free crops among those of each condition: N x V, bool -> one number each."""
    shares = [free_crops[:, FREE[name]].float().mean() for name in conditions]
    return torch.stack(shares) if shares else torch.empty(0)
