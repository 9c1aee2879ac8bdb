"""The losses against their formulas, term by term."""

import math

import pytest
import torch

from pretrain.moco.losses import LOSSES, NCE, InfoNCE


def logits(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, 8, generator=generator, dtype=torch.float64)


def test_infonce_is_eqn_1():
    terms = [
        -math.log(math.exp(row[0]) / sum(math.exp(x) for x in row)) for row in logits().tolist()
    ]
    assert float(InfoNCE()(logits())) == pytest.approx(sum(terms) / 5, rel=1e-12)


def slow_nce(rows: list[list[float]], z: float, samples: int) -> float:
    """J_NCE of Wu et al. 2018, Eqn. (4) to (7): m negatives, noise uniform over `samples`."""
    m, noise = len(rows[0]) - 1, 1 / samples

    def h(logit: float) -> float:
        p = math.exp(logit) / z
        return p / (p + m * noise)

    terms = [-math.log(h(row[0])) - sum(math.log(1 - h(x)) for x in row[1:]) for row in rows]
    return sum(terms) / len(rows)


@pytest.mark.parametrize("samples", [100, 10_000])
def test_nce_keeps_the_constant_of_its_first_batch(samples):
    """Eqn. (8): Z is the mean over images and negatives, times the number of samples."""
    first, second = logits(0), logits(1)
    negatives = [x for row in first.tolist() for x in row[1:]]
    z = samples * sum(math.exp(x) for x in negatives) / len(negatives)
    loss = NCE().double()
    assert float(loss(first)) == pytest.approx(slow_nce(first.tolist(), z, samples), rel=1e-12)
    assert float(loss(second)) == pytest.approx(slow_nce(second.tolist(), z, samples), rel=1e-12)


def test_the_constant_of_nce_is_part_of_its_state():
    loss, resumed = NCE(), NCE()
    loss(logits(0).float())
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(logits(1).float()), loss(logits(1).float()))
    assert not torch.equal(NCE()(logits(1).float()), loss(logits(1).float()))


def test_nce_survives_a_low_temperature():
    """exp(100) is no float32."""
    extreme = torch.tensor([[100.0, 100.0, -100.0]])
    assert float(NCE()(extreme)) == pytest.approx(2 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_chance_is_the_loss_of_equal_logits(name):
    loss = LOSSES[name]()
    equal = torch.full((4, 1 + 300), 0.7)
    assert float(loss(equal)) == pytest.approx(loss.chance(300), rel=1e-5)
