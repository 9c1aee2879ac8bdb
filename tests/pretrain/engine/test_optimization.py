"""Schedules against the papers' sentences."""

import math

import pytest

from pretrain.engine.optimization import build_schedule
from pretrain.flags import parse_pretraining


def schedule(*flags: str):
    args = parse_pretraining(["DATA", *flags])
    return build_schedule(
        args.schedule,
        args.epochs,
        args.iterations,
        cosine=args.cos,
        decay=args.lr_decay,
        decay_every=args.lr_decay_every,
    )


def test_v1_drops_by_ten_at_epochs_120_and_160():
    factor = schedule()
    epochs = [0, 119, 120, 159, 160, 199]
    assert [factor(e, 10 * e) for e in epochs] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_ig1b_decays_by_a_tenth_after_every_62500_iterations():
    """Sec. 4: 0.9x after every 62.5k iterations, 1.25M in all: the last of 20 values is 0.9^19."""
    factor = schedule("--iterations", "1250000", "--lr-decay-every", "62500")
    assert factor(0, 62_499) == 1
    assert factor(0, 62_500) == pytest.approx(0.9)
    assert factor(1, 1_249_999) == pytest.approx(0.9**19)
    assert schedule("--lr-decay-every", "10", "--lr-decay", "0.5")(3, 30) == 0.125


def test_cosine_by_epochs_is_the_official_one():
    factor = schedule("--cos", "--epochs", "200")
    for epoch in (0, 1, 100, 199):
        wanted = 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
        assert factor(epoch, 10 * epoch) == factor(epoch, 10 * epoch + 9) == wanted


def test_cosine_by_iterations_moves_with_every_step():
    factor = schedule("--cos", "--iterations", "40")
    assert [factor(0, step) for step in (0, 20)] == pytest.approx([1, 0.5])
    assert factor(0, 39) == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))
