"""Several forward passes for one optimizer step, in Detectron2's trainer."""

import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from torch.nn.parallel import DistributedDataParallel


class AccumulatingTrainer(SimpleTrainer):
    """SimpleTrainer whose step is the mean gradient of `accumulation` batches of its loader.

    Args:
        model, data_loader, optimizer: as for SimpleTrainer.
        accumulation: forward passes of one step.
        amp: float16 with loss scaling on CUDA, bfloat16 on a CPU.
    """

    def __init__(self, model, data_loader, optimizer, accumulation: int, amp: bool):
        super().__init__(model, data_loader, optimizer)
        self.accumulation = accumulation
        self.amp = amp
        self.device = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=amp and self.device == "cuda")

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode"
        self.optimizer.zero_grad()
        passes, waited = [], 0.0
        for number in range(self.accumulation):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            waited += time.perf_counter() - start
            passes.append(self._backward(batch, last=number + 1 == self.accumulation))
        losses = {k: sum(p[k] for p in passes) / self.accumulation for k in passes[0]}
        self._write_metrics(losses, waited)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, batch: list[dict], last: bool) -> dict[str, torch.Tensor]:
        """Add a batch's share of the gradients; only the `last` exchange tells other processes."""
        distributed = isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if distributed and not last else nullcontext():
            with self._autocast():
                losses = self.model(batch)
                total = sum(losses.values()) / self.accumulation
            self.grad_scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _autocast(self):
        dtype = torch.float16 if self.device == "cuda" else torch.bfloat16
        return torch.autocast(self.device, dtype, enabled=self.amp)

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
