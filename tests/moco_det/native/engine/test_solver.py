"""The optimizer and its schedule: values by hand, and Detectron2's own where it is installed."""

import copy
import math

import pytest
import record_schedules
import torch
from recording import read
from torch import nn

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.native.engine.solver import (
    build_lr_scheduler,
    build_optimizer,
    lay_out_momentum,
    parameter_groups,
)
from moco_det.native.engine.trainer import TrainingState
from moco_det.native.modeling.layers import kernels_of


def make_cfg(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        section, _, name = key.rpartition("__")
        node = cfg.SOLVER[section] if section else cfg.SOLVER
        node[name] = value
    return cfg


def make_model():
    """conv (with bias), BN, GN, a frozen layer, and a weight used twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
    model.add_module("frozen", nn.Conv2d(8, 8, 1).requires_grad_(False))
    model.add_module("tied", nn.Conv2d(3, 8, 1))
    model.tied.weight = model[0].weight
    return model


def rates(model, **rules):
    """Parameter name -> (lr, weight decay)."""
    defaults = {"lr": 0.1, "weight_decay": 1e-4, "weight_decay_norm": 0.0}
    groups = parameter_groups(model, **{**defaults, **rules})
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found), groups


def test_defaults_spare_only_the_norms_from_decay():
    found, groups = rates(make_model(), weight_decay_bias=None, bias_lr_factor=1.0)
    assert found == {
        "0.weight": (0.1, 1e-4),
        "0.bias": (0.1, 1e-4),
        "1.weight": (0.1, 0.0),
        "1.bias": (0.1, 0.0),
        "2.weight": (0.1, 0.0),
        "2.bias": (0.1, 0.0),
        "tied.bias": (0.1, 1e-4),
    }
    assert len(groups) == 2


def test_biases_have_their_own_rules_in_norms_too():
    found, _ = rates(make_model(), weight_decay_bias=5e-5, bias_lr_factor=2.0)
    assert found["0.weight"] == (0.1, 1e-4)
    assert found["1.weight"] == (0.1, 0.0)
    assert found["0.bias"] == found["1.bias"] == found["2.bias"] == (0.2, 5e-5)


@pytest.mark.parametrize("bias_decay", [None, 0.0, 3e-4])
@pytest.mark.parametrize("bias_factor", [1.0, 2.0])
def test_groups_are_detectron2s(bias_decay, bias_factor):
    solver = pytest.importorskip("detectron2.solver")
    cfg = make_cfg(WEIGHT_DECAY_BIAS=bias_decay, BIAS_LR_FACTOR=bias_factor, WEIGHT_DECAY_NORM=2e-5)
    model = make_model()
    ours, theirs = build_optimizer(cfg, model), solver.build_optimizer(cfg, model)
    keys = ("lr", "weight_decay", "momentum", "nesterov")

    def settings(optimizer):
        return {p: [g[k] for k in keys] for g in optimizer.param_groups for p in g["params"]}

    assert settings(ours) == settings(theirs)


def schedule(cfg):
    optimizer = torch.optim.SGD(
        [
            {"params": [nn.Parameter(torch.zeros(1))], "lr": cfg.SOLVER.BASE_LR},
            {"params": [nn.Parameter(torch.zeros(1))], "lr": 2 * cfg.SOLVER.BASE_LR},
        ],
        lr=cfg.SOLVER.BASE_LR,
    )
    scheduler = build_lr_scheduler(cfg, optimizer)
    values = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        values.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert all(double == pytest.approx(2 * single) for single, double in values)
    return [single for single, _ in values]


@pytest.mark.parametrize("method", ["linear", "constant"])
def test_multistep_by_hand(method):
    cfg = make_cfg(
        BASE_LR=0.02, MAX_ITER=100, STEPS=(50, 80), GAMMA=0.1,
        WARMUP_ITERS=10, WARMUP_FACTOR=0.001, WARMUP_METHOD=method,
    )  # fmt: skip

    def expected(t):
        if t < 10:
            return 0.02 * (0.001 * (1 - t / 10) + t / 10 if method == "linear" else 0.001)
        return 0.02 * 0.1 ** ((t >= 50) + (t >= 80))

    assert schedule(cfg) == pytest.approx([expected(t) for t in range(100)], rel=1e-9)


def test_cosine_by_hand():
    cfg = make_cfg(
        LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR=0.02, BASE_LR_END=0.002, MAX_ITER=100,
        WARMUP_ITERS=10, WARMUP_FACTOR=0.1,
    )  # fmt: skip

    def cosine(t):
        return 0.002 + (0.02 - 0.002) * 0.5 * (1 + math.cos(math.pi * t / 100))

    warmup = [0.002 + (cosine(10) - 0.002) * t / 10 for t in range(10)]
    expected = warmup + [cosine(t) for t in range(10, 100)]
    assert schedule(cfg) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", record_schedules.CASES)
def test_curves_recorded_from_detectron2(case):
    rates = record_schedules.curve(make_cfg(**record_schedules.CASES[case]), build_lr_scheduler)
    assert rates == pytest.approx(read("schedules")[case], rel=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        {"MAX_ITER": 240, "STEPS": (180, 220), "WARMUP_ITERS": 10},
        {"MAX_ITER": 90, "STEPS": (60, 80, 200), "WARMUP_ITERS": 0},
        {"MAX_ITER": 70, "STEPS": (), "WARMUP_ITERS": 100, "WARMUP_METHOD": "constant"},
        {"MAX_ITER": 97, "STEPS": (5, 60), "WARMUP_ITERS": 13, "GAMMA": 0.3},
        {"MAX_ITER": 97, "LR_SCHEDULER_NAME": "WarmupCosineLR", "WARMUP_ITERS": 7},
        {"MAX_ITER": 97, "LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 1e-4},
    ],
)
def test_schedule_is_detectron2s(solver):
    d2 = pytest.importorskip("detectron2.solver")
    cfg = make_cfg(**solver)
    cfg.SOLVER.NUM_DECAYS = 3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = d2.build_lr_scheduler(cfg, optimizer)
    expected = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert schedule(cfg) == expected


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"STEPS": (30, 20)}, r"SOLVER\.STEPS"),
        ({"WARMUP_METHOD": "exponential"}, r"SOLVER\.WARMUP_METHOD"),
    ],
)
def test_impossible_schedules_are_refused(solver, message):
    with pytest.raises(UserError, match=message):
        schedule(make_cfg(MAX_ITER=100, **solver))


def stepped(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clipping_by_hand(kind):
    cfg = make_cfg(
        BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0, CLIP_GRADIENTS__ENABLED=True,
        CLIP_GRADIENTS__CLIP_TYPE=kind, CLIP_GRADIENTS__CLIP_VALUE=1.0,
    )  # fmt: skip
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    gradients = [torch.tensor([[3.0, -4.0]]), torch.tensor([0.5])]
    weight, bias = stepped(build_optimizer(cfg, model), list(model.parameters()), gradients)
    expected = [[-1.0, 1.0]] if kind == "value" else [[-0.6, 0.8]]
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert bias.item() == -0.5  # by itself it is within the limit: each parameter has its own norm


@pytest.mark.parametrize(("norm_type", "factor"), [(1.0, 1 / 7), (2.0, 1 / 5), (math.inf, 1 / 4)])
def test_the_norm_of_clipping_is_that_of_its_key(norm_type, factor):
    cfg = make_cfg(
        BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0, CLIP_GRADIENTS__ENABLED=True,
        CLIP_GRADIENTS__CLIP_TYPE="norm", CLIP_GRADIENTS__CLIP_VALUE=1.0,
        CLIP_GRADIENTS__NORM_TYPE=norm_type,
    )  # fmt: skip
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    (weight,) = stepped(build_optimizer(cfg, model), [model.weight], [torch.tensor([[3.0, -4.0]])])
    torch.testing.assert_close(weight, factor * torch.tensor([[-3.0, 4.0]]))


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_by_hand(nesterov):
    """v <- m v + g + decay w; w <- w - lr v, or w - lr (g + decay w + m v) with Nesterov's."""
    cfg = make_cfg(BASE_LR=0.1, MOMENTUM=0.7, WEIGHT_DECAY=0.05, NESTEROV=nesterov)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer, weight, velocity = build_optimizer(cfg, model), 1.0, 0.0
    for gradient in (2.0, -1.0, 0.5):
        step = gradient + 0.05 * weight
        velocity = 0.7 * velocity + step
        weight -= 0.1 * (step + 0.7 * velocity if nesterov else velocity)
        (found,) = stepped(optimizer, [model.weight], [torch.tensor([[gradient]])])
        assert found.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_clipping_is_torch_s_of_each_parameter(norm_type):
    cfg = make_cfg(
        BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0, CLIP_GRADIENTS__ENABLED=True,
        CLIP_GRADIENTS__CLIP_TYPE="norm", CLIP_GRADIENTS__NORM_TYPE=norm_type,
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 2), nn.Linear(2, 2))
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    gradients = [torch.randn(p.shape) * 10.0**-i for i, p in enumerate(parameters)]
    optimizer = build_optimizer(cfg, model)
    after = stepped(optimizer, parameters[:-1], gradients[:-1])  # one has no gradient
    for new, old, gradient in zip(after, before, gradients, strict=False):
        leaf = nn.Parameter(torch.zeros_like(gradient))
        leaf.grad = gradient
        nn.utils.clip_grad_norm_(leaf, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, norm_type)
        assert torch.equal(new, old - leaf.grad)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scaled_steps_of_a_gpu_are_plain_ones(device, clip):
    """The first overflows and is left out; the others are clipped after they are unscaled."""
    cfg = make_cfg(BASE_LR=0.1, MOMENTUM=0.9, CLIP_GRADIENTS__ENABLED=clip)
    ours = nn.Linear(5, 3).to(device)
    theirs = copy.deepcopy(ours)
    with kernels_of("cuda"):
        optimizer = build_optimizer(cfg, ours)
    assert optimizer.param_groups[0]["fused"]
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    schedule = build_lr_scheduler(make_cfg(WARMUP_ITERS=0), optimizer)
    state = TrainingState(ours, optimizer, schedule, scaler, seed=0)
    reference = build_optimizer(cfg, theirs)
    for gradient in (math.inf, 3.0, -2.0):
        before = [p.detach().clone() for p in ours.parameters()]
        scaler.scale(torch.zeros((), device=device))  # as a loss, which sets the scaler up
        for parameter in ours.parameters():
            parameter.grad = torch.full_like(parameter, gradient) * scaler.get_scale()
        state.step()
        if gradient == math.inf:
            assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
            continue
        stepped(reference, theirs.parameters(), [torch.full_like(p, gradient) for p in before])
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert scaler.get_scale() == 4.0


def test_momentum_of_another_device_is_laid_out_as_the_parameters():
    conv = nn.Conv2d(3, 4, 3)
    plain = build_optimizer(make_cfg(), conv)
    stepped(plain, conv.parameters(), [torch.randn(p.shape) for p in conv.parameters()])
    saved = {p: plain.state[p]["momentum_buffer"].clone() for p in conv.parameters()}
    conv.to(memory_format=torch.channels_last)
    with kernels_of("cuda"):
        fused = build_optimizer(make_cfg(), conv)
    for parameter in conv.parameters():
        fused.state[parameter] = {"momentum_buffer": saved[parameter]}
    lay_out_momentum(fused)
    for parameter in conv.parameters():
        momentum = fused.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, saved[parameter])
        assert momentum.stride() == parameter.stride()


def test_unknown_clipping_is_refused():
    cfg = make_cfg(CLIP_GRADIENTS__ENABLED=True, CLIP_GRADIENTS__CLIP_TYPE="full_model")
    with pytest.raises(UserError, match="CLIP_TYPE"):
        build_optimizer(cfg, make_model())


@pytest.mark.parametrize("clip", [None, "value", "norm"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_detectron2s(clip, nesterov):
    solver = pytest.importorskip("detectron2.solver")
    cfg = make_cfg(
        BASE_LR=0.1, NESTEROV=nesterov, CLIP_GRADIENTS__ENABLED=clip is not None,
        CLIP_GRADIENTS__CLIP_TYPE=clip or "value", CLIP_GRADIENTS__CLIP_VALUE=0.5,
    )  # fmt: skip
    ours = make_model()
    theirs = copy.deepcopy(ours)
    for build, model in ((build_optimizer, ours), (solver.build_optimizer, theirs)):
        optimizer = build(cfg, model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            stepped(
                optimizer,
                parameters,
                [torch.randn(p.shape, generator=generator) for p in parameters],
            )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


# -- Adam, and the poly schedule ------------------------------------------------------------------


def test_adam_is_torchs_over_the_same_groups():
    """Against one Adam for each parameter, with its own rate and decay."""
    model, other = make_model(), make_model()
    cfg = make_cfg(
        OPTIMIZER="Adam", BASE_LR=0.01, WEIGHT_DECAY=0.1, WEIGHT_DECAY_NORM=0.2, BIAS_LR_FACTOR=2.0
    )
    optimizer = build_optimizer(cfg, model)
    singles = []
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            decay, rate = 0.2 if name[0] in "12" else 0.1, 0.02 if "bias" in name else 0.01
            singles.append(torch.optim.Adam([parameter], rate, weight_decay=decay))
    for step in range(3):
        for network, parts in ((model, [optimizer]), (other, singles)):
            generator = torch.Generator().manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for part in parts:
                part.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_moments_of_a_fused_adam_lie_as_its_parameters_do():
    """A checkpoint of a CPU has them in another order, which the kernel would not see."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight], fused=True)
    saved = torch.randn(4, 3, 3, 3).abs()
    optimizer.state[weight] = {
        "step": torch.tensor(5, dtype=torch.float64), "exp_avg": -saved, "exp_avg_sq": saved,
    }  # fmt: skip
    lay_out_momentum(optimizer)
    state = optimizer.state[weight]
    for name, value in (("exp_avg", -saved), ("exp_avg_sq", saved)):
        assert state[name].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(state[name], value)
    assert (state["step"].item(), state["step"].dtype) == (5, torch.float32)


def test_poly_schedule_by_hand():
    cfg = make_cfg(
        LR_SCHEDULER_NAME="WarmupPolyLR",
        MAX_ITER=10,
        BASE_LR=2.0,
        POLY_LR_POWER=0.9,
        WARMUP_ITERS=0,
    )
    assert poly_rates(cfg) == pytest.approx([2 * (1 - i / 10) ** 0.9 for i in range(11)])
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = 4, 0.1
    expected = [2 * (1 - i / 10) ** 0.9 * min(0.1 + 0.9 * i / 4, 1) for i in range(11)]
    assert poly_rates(cfg) == pytest.approx(expected)
    cfg.SOLVER.WARMUP_METHOD = "constant"
    assert poly_rates(cfg)[3] == pytest.approx(0.2 * 0.7**0.9)
    cfg.SOLVER.WARMUP_METHOD = "burnin"
    with pytest.raises(UserError, match="SOLVER.WARMUP_METHOD is 'burnin'"):
        poly_rates(cfg)


def poly_rates(cfg):
    """Of each iteration, and once more after the last."""
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler, found = build_lr_scheduler(cfg, optimizer), []
    for _ in range(cfg.SOLVER.MAX_ITER + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_poly_schedule_is_that_of_detectron2s_deeplab():
    pytest.importorskip("detectron2", reason="compares with Detectron2, which is not installed")
    lr_scheduler = pytest.importorskip("detectron2.projects.deeplab.lr_scheduler")
    cfg = make_cfg(LR_SCHEDULER_NAME="WarmupPolyLR", MAX_ITER=20, BASE_LR=0.1, WARMUP_ITERS=6)
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    solver = cfg.SOLVER
    warmup = solver.WARMUP_FACTOR, solver.WARMUP_ITERS, solver.WARMUP_METHOD
    theirs = lr_scheduler.WarmupPolyLR(optimizer, 20, *warmup, power=solver.POLY_LR_POWER)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert poly_rates(cfg)[:20] == pytest.approx(found)
