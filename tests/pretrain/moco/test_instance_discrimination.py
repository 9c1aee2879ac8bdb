"""Shuffled BN: the shuffle is undone, equal everywhere, and hides what it is to hide."""

import numpy as np
import pytest
import torch
from mean_colour import MeanColour, views
from torch import nn

from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.momentum_contrast import MoCo


@pytest.mark.usefixtures("float64")
def test_the_shuffle_is_undone_exactly():
    model = MoCo(MeanColour(), dim=4, queue_size=4)
    images = views(12, 0)
    direct = model.encode(model.encoder_k, images)
    for step in range(5):
        order = shuffle_index(7, step, 12)
        assert sorted(order.tolist()) == list(range(12))
        torch.testing.assert_close(model.encode_shuffled(model.encoder_k, images, order), direct)


def test_the_shuffle_is_a_function_of_seed_and_step():
    assert torch.equal(shuffle_index(1, 2, 64), shuffle_index(1, 2, 64))
    assert not torch.equal(shuffle_index(1, 2, 64), shuffle_index(1, 3, 64))
    assert not torch.equal(shuffle_index(1, 2, 64), shuffle_index(2, 2, 64))


class Level(nn.Module):
    """Encoder whose feature is the image's level after BN: (level, 1), before normalisation."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)

    def forward(self, pixels):
        level = self.bn(pixels).mean(dim=(1, 2, 3))
        return torch.stack([level, torch.ones_like(level)], dim=1)


def leak(shuffled: bool, trials: int = 400) -> float:
    """Correlation of the feature of a black query with that of its own black key.

    Black images all look alike, and a group's BN statistics depend on its white images only. Of 16
    images in 2 groups, 5 are white, 1 to 4 of them in the first group. What the features of black
    images still share is therefore knowledge of the companions, the leak of Sec. 3.3.
    """
    model = MoCo(Level(), dim=2, queue_size=4, bn_groups=2)
    rng = np.random.default_rng(0)
    pairs = []
    for trial in range(trials):
        white = int(rng.integers(1, 5))
        images = torch.zeros(16, 4, 4, 3, dtype=torch.uint8)
        images[:white] = 255
        images[8 : 8 + 5 - white] = 255
        order = shuffle_index(0, trial, 16) if shuffled else torch.arange(16)
        q = model.encode(model.encoder_q, images)
        k = model.encode_shuffled(model.encoder_k, images, order)
        pairs += [(float(q[i, 0]), float(k[i, 0])) for i in (7, 15)]
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def test_shuffling_hides_a_query_s_companions_from_its_key():
    assert leak(shuffled=False) > 0.99
    assert abs(leak(shuffled=True)) < 0.15  # 800 pairs: three standard errors are 0.11
