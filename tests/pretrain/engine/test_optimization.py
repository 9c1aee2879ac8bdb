"""Schedules against the papers' sentences; LARS against its formula; steps that fp16 leaves out."""

import math

import numpy as np
import pytest
import torch
from devices import DEVICES
from torch import nn

from moco_det.common.errors import UserError
from pretrain.engine.optimization import LARS, ScheduledSGD, build_schedule
from pretrain.flags.pretraining import parse_pretraining


def schedule(*flags: str, steps_per_epoch: int = 10):
    args = parse_pretraining(["DATA", *flags])
    return build_schedule(
        args.schedule,
        args.epochs,
        args.iterations,
        cosine=args.cos,
        decay=args.lr_decay,
        decay_every=args.lr_decay_every,
        warmup_epochs=args.warmup_epochs,
        steps_per_epoch=steps_per_epoch,
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


def test_simclr_s_warm_up_rises_to_a_cosine_of_the_rest():
    """10 epochs of 5 steps from 0, then half a cosine over the other 190 (arXiv:2002.05709)."""
    factor = schedule("--cos", "--epochs", "200", "--warmup-epochs", "10", steps_per_epoch=5)
    assert [factor(0, 0), factor(0, 1), factor(9, 49)] == [0, 1 / 50, 49 / 50]
    for epoch, done in ((10, 0), (105, 0.5), (199, 189 / 190)):
        assert factor(epoch, 5 * epoch) == 0.5 * (1 + math.cos(math.pi * done))


def test_a_warm_up_leaves_the_other_schedules_where_they_are():
    steps = schedule("--warmup-epochs", "2")
    assert [steps(1, 10), steps(2, 20), steps(120, 1200)] == pytest.approx([0.5, 1, 0.1])
    cosine = schedule("--cos", "--iterations", "60", "--warmup-epochs", "2")
    assert [cosine(0, 5), cosine(2, 20), cosine(4, 40)] == pytest.approx([0.25, 1, 0.5])
    decay = schedule("--lr-decay-every", "10", "--lr-decay", "0.5", "--warmup-epochs", "1")
    assert [decay(0, 5), decay(1, 10), decay(3, 30)] == [0.5, 0.5, 0.125]


def test_no_warm_up_of_all_epochs():
    with pytest.raises(UserError, match="--warmup-epochs 5: there are --epochs 5"):
        parse_pretraining(["DATA", "--epochs", "5", "--warmup-epochs", "5"])


# -- LARS -----------------------------------------------------------------------------------------


def test_a_step_of_lars_by_hand():
    """|w| = 5, |g + d w| = |(0.3, 2.4)| with d = 0.1: the step is lr 0.001 * 5 / |(0.3, 2.4)|."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.0, 2.0]])
    LARS([weight], lr=10.0, momentum=0.9, weight_decay=0.1).step()
    scale = 10 * 0.001 * 5 / math.hypot(0.3, 2.4)
    torch.testing.assert_close(weight.data, torch.tensor([[3 - 0.3 * scale, 4 - 2.4 * scale]]))


def test_what_is_zero_is_not_scaled():
    zero, still = (nn.Parameter(torch.full((1, 2), value)) for value in (0.0, 2.0))
    zero.grad, still.grad = torch.ones(1, 2), torch.zeros(1, 2)
    LARS([zero, still], lr=0.5, momentum=0.0, weight_decay=0.0).step()
    assert zero.tolist() == [[-0.5, -0.5]] and still.tolist() == [[2.0, 2.0]]


LR, MOMENTUM, DECAY, TRUST = 0.3, 0.9, 0.01, 0.001


def slow_lars(parameters: list[np.ndarray], gradients: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The formula, a step for each of `gradients`; what has one dimension takes SGD's step."""
    velocities = [np.zeros_like(parameter) for parameter in parameters]
    for of_step in gradients:
        for index, gradient in enumerate(of_step):
            direction, weight = gradient, parameters[index]
            if weight.ndim > 1:
                direction = gradient + DECAY * weight
                direction = direction * TRUST * np.sqrt((weight**2).sum() / (direction**2).sum())
            velocities[index] = MOMENTUM * velocities[index] + direction
            parameters[index] = weight - LR * velocities[index]
    return parameters


@pytest.mark.parametrize("scaled", [False, True])
def test_lars_follows_its_formula(scaled):
    """Convolution, BN and a layer with a bias, for three steps; fp16's gradient scale is undone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2)
    ).double()
    model[4].requires_grad_(False)  # as MoCo's key encoder, which has no gradients
    start = [parameter.detach().numpy().copy() for parameter in model[:4].parameters()]
    optimizer = ScheduledSGD(model, LR, MOMENTUM, DECAY, scale_gradients=scaled, lars=True)
    gradients = []
    for _ in range(3):
        inputs = torch.randn(8, 3, 3, 3, dtype=torch.float64)
        loss = model(inputs).square().mean()
        of_step = torch.autograd.grad(loss, list(model[:4].parameters()), retain_graph=True)
        gradients.append([gradient.numpy().copy() for gradient in of_step])
        optimizer.minimize(loss)
    wanted = slow_lars(start, gradients)
    for ours, theirs in zip(model[:4].parameters(), wanted, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-12)


def test_the_scaler_of_gradients_goes_on_where_it_was():
    def make():
        torch.manual_seed(0)
        return ScheduledSGD(nn.Linear(2, 1), 0.1, 0.9, 0.0, scale_gradients=True)

    first, second = make(), make()
    first.minimize((first.sgd.param_groups[0]["params"][0] ** 2).sum())
    first.scaler.update(64.0)
    second.load_state(first.state() | {"step": 1})
    assert second.scaler.get_scale() == 64.0
    momenta = [x.sgd.state_dict()["state"][0]["momentum_buffer"] for x in (first, second)]
    assert torch.equal(*momenta)


# -- fp16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_first_step_that_fp16_leaves_out_is_no_step(device):
    """PyTorch's fused SGD took what its momentum's memory held before."""
    size = 10_000
    junk = [torch.full((size,), 7.0, device=device) for _ in range(8)]
    layer = nn.Linear(size, 1, bias=False).to(device)
    before = layer.weight.detach().clone()
    optimizer = ScheduledSGD(layer, 0.5, 0.9, 0.0, scale_gradients=True)
    del junk
    optimizer.minimize((layer.weight * 1e36).sum())  # overflows when scaled
    assert torch.equal(layer.weight, before)
    for step, moved in ((1, 1.0), (2, 1.9), (3, 2.71)):  # 0.9 of the last, and the gradient of 1
        optimizer.minimize(layer.weight.sum())
        before -= 0.5 * moved
        torch.testing.assert_close(layer.weight.detach(), before, msg=f"step {step}")
