"""SGD by a schedule, mixed precision, and gradients that are averaged over the processes."""

import inspect
import math
from collections.abc import Callable

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


class ScheduledSGD:
    """SGD whose learning rate follows a schedule; gradients are scaled where fp16 needs it.

    All parameters decay, as in the official code. MoCo's key encoder's come along without
    gradients, so that optimizer states can be exchanged with it.

    Args:
        model: whose parameters are optimized.
        lr, momentum, weight_decay: of SGD.
        schedule: (epoch, step) -> factor of `lr`; both count from 0, the step over the whole run.
        scale_gradients: whether small gradients would underflow, as those of fp16 do.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float,
        weight_decay: float,
        schedule: Callable[[int, int], float] = lambda epoch, step: 1.0,
        scale_gradients: bool = False,
    ):
        self.lr = lr
        self.schedule = schedule
        parameters = list(model.parameters())
        self.sgd = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=True)
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
        self.scaler.step(self.sgd)
        self.scaler.update()

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
) -> Callable[[int, int], float]:
    """(epoch, step) -> factor of the learning rate; both count from 0, the step over the whole run.

    - `decay_every` steps: `decay` to the power of step // decay_every (IG-1B: 0.9 and 62,500).
    - `cosine`: half a cosine over all epochs, constant within one as in the official code; over
      `iterations`, where that is the length of the run.
    - otherwise 0.1 at each epoch of `milestones`.
    """
    if decay_every:
        return lambda epoch, step: decay ** (step // decay_every)
    if cosine:
        return lambda epoch, step: cosine_decay(step / iterations if iterations else epoch / epochs)
    return lambda epoch, step: 0.1 ** sum(epoch >= milestone for milestone in milestones)


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
