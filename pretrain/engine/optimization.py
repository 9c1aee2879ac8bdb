"""SGD and LARS by a schedule, mixed precision, gradients averaged over the processes."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_det.common.processes import world_size
from moco_det.common.resume_state import check_optimizer, check_scaler

# torch 2.14 renamed it, and warns of the old name; under the new one, buffers are broadcast once,
# by the constructor, which changes nothing where all processes have loaded the same.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class LARS(torch.optim.SGD):
    """SGD whose steps are scaled layer by layer, for large batches (arXiv:1708.03888).

    A weight w with gradient g moves along  trust * |w| / |g + d w| * (g + d w),  d being the weight
    decay, under SGD's momentum. Biases and the parameters of BN, which have one dimension, take
    SGD's step without decay, and a weight or gradient of zeros is not scaled: as in the code of
    SimCLR (arXiv:2002.05709). You et al. have |g| + d |w| below the line.

    Args:
        trust: the trust coefficient; SimCLR's.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        trust: float = 0.001,
    ):
        super().__init__(parameters, lr, momentum)  # not fused: fp16's gradients come unscaled
        self.decay, self.trust = weight_decay, trust

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        parameters = (p for group in self.param_groups for p in group["params"])
        for weight in parameters:
            if weight.grad is not None and weight.ndim > 1:
                direction = weight.grad.add_(weight, alpha=self.decay)
                ratio = self.trust * weight.norm() / direction.norm()
                direction.mul_(torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0))
        return super().step(closure)


class ScheduledSGD:
    """SGD whose learning rate follows a schedule; gradients are scaled where fp16 needs it.

    All parameters decay, as in the official code (not so with LARS). MoCo's key encoder's come
    along without gradients, so that optimizer states can be exchanged with it.

    Args:
        model: whose parameters are optimized.
        lr, momentum, weight_decay: of SGD.
        schedule: (epoch, step) -> factor of `lr`; both count from 0, the step over the whole run.
        scale_gradients: whether small gradients would underflow, as those of fp16 do.
        lars: see `LARS`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float,
        weight_decay: float,
        schedule: Callable[[int, int], float] = lambda epoch, step: 1.0,
        scale_gradients: bool = False,
        lars: bool = False,
    ):
        self.lr = lr
        self.schedule = schedule
        parameters = list(model.parameters())
        kind = LARS if lars else partial(torch.optim.SGD, fused=True)
        self.sgd = kind(parameters, lr, momentum, weight_decay=weight_decay)
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=scale_gradients)

    @property
    def rate(self) -> float:
        """The learning rate of now."""
        return self.sgd.param_groups[0]["lr"]

    def set_rate(self, epoch: int, step: int) -> None:
        for group in self.sgd.param_groups:
            group["lr"] = self.lr * self.schedule(epoch, step)

    def minimize(self, loss: torch.Tensor) -> None:
        """One step down the gradient of `loss`."""
        self.sgd.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled() and not self.sgd.state:
            self._begin_momentum()
        self.scaler.step(self.sgd)
        self.scaler.update()

    def _begin_momentum(self) -> None:
        """With zeros, to which the first gradient is added. Where the scaler leaves out the first
        step, PyTorch's fused SGD would begin with whatever the memory held."""
        for group in self.sgd.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and parameter.grad is not None:
                    zeros = torch.zeros_like(parameter)
                    self.sgd.state[parameter]["momentum_buffer"] = zeros

    def state(self) -> dict:
        """Two entries of a checkpoint."""
        return {"optimizer": self.sgd.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict) -> None:
        """From a checkpoint; those of the official code have no scaler.

        Raises:
            StateFault: the entry is not of this optimizer, or would lose the momentum.
        """
        scaled = bool(check_scaler(state.get("scaler", {})))
        # fp16 leaves out steps, with which the first momentum may be still to come.
        stepped = not scaled and bool(state.get("step", state.get("epoch")))
        check_optimizer(state.get("optimizer"), self.sgd, stepped, own="step" in state)
        self.sgd.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def build_schedule(
    milestones: list[int],
    epochs: int,
    iterations: int | None = None,
    cosine: bool = False,
    decay: float = 0.9,
    decay_every: int | None = None,
    warmup_epochs: int = 0,
    steps_per_epoch: int = 0,
) -> Callable[[int, int], float]:
    """(epoch, step) -> factor of the learning rate; both count from 0, the step over the whole run.

    - `decay_every` steps: `decay` to the power of step // decay_every (IG-1B: 0.9 and 62,500).
    - `cosine`: half a cosine over all epochs, constant within one as in the official code; over
      `iterations`, where that is the length of the run.
    - otherwise 0.1 at each epoch of `milestones`.

    The first `warmup_epochs` of `steps_per_epoch` rise linearly from 0; a cosine begins after them
    (SimCLR: 10 epochs).
    """
    warmup = warmup_epochs * steps_per_epoch  # in steps

    def factor(epoch: int, step: int) -> float:
        if step < warmup:
            return step / warmup
        if decay_every:
            return decay ** (step // decay_every)
        if cosine and iterations:
            return cosine_decay((step - warmup) / (iterations - warmup))
        if cosine:
            return cosine_decay((epoch - warmup_epochs) / (epochs - warmup_epochs))
        return 0.1 ** sum(epoch >= milestone for milestone in milestones)

    return factor


def cosine_decay(done: float) -> float:
    """1 at the beginning (done = 0), 0 at the end (done = 1)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def parallelize(model: nn.Module) -> nn.Module:
    """Average gradients over the processes, where there are several.

    Buffers are not broadcast in steps: MoCo's queue and the memory bank are equal everywhere by
    construction, and running statistics are read from the main process only.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, **OWN_BUFFERS, gradient_as_bucket_view=True)
