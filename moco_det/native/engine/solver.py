"""SGD or Adam, and its schedule, as Detectron2 builds them from the SOLVER section."""

from collections import defaultdict
from collections.abc import Callable

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moco_det.common.errors import UserError
from moco_det.common.processes import print_on_main
from moco_det.native.modeling.layers import on_gpu

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # every BatchNorm, SyncBatchNorm and InstanceNorm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_bias: float | None,
    bias_lr_factor: float,
) -> list[dict]:
    """Trainable parameters grouped by learning rate and weight decay.

    A normalisation layer's parameters take `weight_decay_norm`. Anything named "bias", theirs
    included, takes `lr * bias_lr_factor` and, unless it is None, `weight_decay_bias`.
    """
    groups = defaultdict(dict)  # (lr, weight decay) -> its parameters; a dict is an ordered set
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate = lr
            decay = weight_decay_norm if isinstance(module, NORM_LAYERS) else weight_decay
            if name == "bias":
                rate = lr * bias_lr_factor
                decay = decay if weight_decay_bias is None else weight_decay_bias
            groups[rate, decay][parameter] = None
    return [
        {"params": list(parameters), "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def clip_each_gradient(optimizer: Optimizer, kind: str, limit: float, norm_type: float) -> None:
    """Have `optimizer` clip every parameter's gradient by itself before each step.

    kind: "value" clamps the entries to [-limit, limit]; "norm" scales the gradient of one
    parameter, not of the model, to a `norm_type` norm of at most `limit` (Detectron2's rule).
    """

    def clip(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if kind == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        elif gradients:
            # `nn.utils.clip_grad_norm_` of each, all at once.
            factors = torch._foreach_norm(gradients, norm_type)
            torch._foreach_add_(factors, 1e-6)
            torch._foreach_reciprocal_(factors)
            torch._foreach_mul_(factors, limit)
            torch._foreach_clamp_max_(factors, 1.0)
            torch._foreach_mul_(gradients, factors)

    # A hook, because gradients are unscaled just before `step`.
    optimizer.register_step_pre_hook(clip)


def lay_out_momentum(optimizer: Optimizer) -> None:
    """Have the moments of a fused optimizer lie where, and in memory as, the parameters do.

    The kernel takes all for laid out alike, and a checkpoint may come from another device. Where
    SGD has no momentum yet it starts as 0: the kernel leaves out a step whose loss, scaled,
    overflows, but with the first one not what it has allocated, which would be arbitrary numbers.
    (Adam's moments are allocated as 0.)
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["fused"] else ():
            if isinstance(optimizer, SGD) and group["momentum"]:
                momentum, state = torch.zeros_like(parameter), optimizer.state[parameter]
                saved = state.get("momentum_buffer")
                state["momentum_buffer"] = momentum if saved is None else momentum.copy_(saved)
            elif isinstance(optimizer, Adam) and parameter in optimizer.state:
                state = optimizer.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(parameter).copy_(state[moment])
                state["step"] = state["step"].to(parameter.device, torch.float32)


def build_optimizer(cfg, model: nn.Module) -> Optimizer:
    """The optimizer of SOLVER.OPTIMIZER: Adam is torch's, its weight decay part of the gradient."""
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    fused = on_gpu(next(model.parameters()))
    kernels = {"fused": True} if fused else {"foreach": True}
    if solver.OPTIMIZER == "Adam":
        optimizer = Adam(groups, solver.BASE_LR, **kernels)
    else:
        settings = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer = SGD(groups, solver.BASE_LR, **settings, **kernels)
    lay_out_momentum(optimizer)
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED:
        if clip.CLIP_TYPE not in ("value", "norm"):
            raise UserError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}: use 'value' or 'norm'"
            )
        clip_each_gradient(optimizer, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def with_warmup(
    schedule: ParamScheduler, factor: float, length: float, method: str
) -> ParamScheduler:
    """`schedule` with its first `length` (a fraction of the run) replaced by a warm-up.

    "linear" goes from `factor` times the initial value to what `schedule` has reached where the
    warm-up ends; "constant" stays at `factor` times the initial value.
    """
    first = factor * schedule(0.0)
    if method == "linear":
        warmup = LinearParamScheduler(first, schedule(length))
    elif method == "constant":
        warmup = ConstantParamScheduler(first)
    else:
        raise _no_warmup(method)
    return CompositeParamScheduler(
        [warmup, schedule], lengths=[length, 1 - length], interval_scaling=["rescaled", "fixed"]
    )


def _no_warmup(method: str) -> UserError:
    return UserError(f"SOLVER.WARMUP_METHOD is {method!r}: use 'linear' or 'constant'")


def poly_multiplier(
    power: float, max_iter: int, factor: float, length: int, method: str
) -> Callable[[int], float]:
    """iteration -> (1 - iteration / max_iter) ** power, times a warm-up in the first `length`.

    As the WarmupPolyLR of Detectron2's DeepLab project, whose warm-up is a factor from `factor` to
    1 ("linear"), or is `factor` ("constant"), where that of the other schedules replaces them.
    """
    if method not in ("linear", "constant"):
        raise _no_warmup(method)

    def multiplier(iteration: int) -> float:
        warmup = 1.0
        if iteration < length:
            done = iteration / length if method == "linear" else 0.0
            warmup = factor * (1 - done) + done
        # The schedule is asked once more after the last iteration.
        return warmup * max(1 - iteration / max_iter, 0.0) ** power

    return multiplier


def build_lr_scheduler(cfg, optimizer: Optimizer) -> LambdaLR:
    """WarmupMultiStepLR, WarmupCosineLR or WarmupPolyLR; to be stepped once an iteration.

    All are Detectron2's: multiples of each group's own learning rate, functions of the fraction
    of SOLVER.MAX_ITER that is done.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        warmup = solver.WARMUP_FACTOR, solver.WARMUP_ITERS, solver.WARMUP_METHOD
        return LambdaLR(optimizer, poly_multiplier(solver.POLY_LR_POWER, solver.MAX_ITER, *warmup))
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        schedule = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    else:
        schedule = _multistep(solver.STEPS, solver.GAMMA, solver.MAX_ITER)
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    multiplier = with_warmup(schedule, solver.WARMUP_FACTOR, length, solver.WARMUP_METHOD)
    return LambdaLR(optimizer, lambda iteration: multiplier(iteration / solver.MAX_ITER))


def _multistep(steps, gamma: float, max_iter: int) -> MultiStepParamScheduler:
    used = [step for step in steps if step < max_iter]
    if len(used) < len(steps):
        print_on_main(
            f"SOLVER.STEPS not below SOLVER.MAX_ITER {max_iter} are ignored: {tuple(steps)}"
        )
    if used != sorted(set(used)):
        raise UserError(f"SOLVER.STEPS {tuple(steps)} must increase from one step to the next")
    values = [gamma**drops for drops in range(len(used) + 1)]
    return MultiStepParamScheduler(values, milestones=used, num_updates=max_iter)
