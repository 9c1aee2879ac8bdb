"""The task of pretraining: Algorithm 1 on batches of views, with whatever mechanism gives keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.gpus import upload
from moco_det.common.processes import broadcast_buffers, from_main, is_main, print_on_main, rank
from pretrain.data.batched_augmentations import compiled_looks, finished
from pretrain.data.images import FolderSource
from pretrain.data.multi_crop import free_shares
from pretrain.data.shards import ShardSource
from pretrain.data.sheets import draw_views
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.device import compile_encoders, settle_compilation
from pretrain.engine.optimization import ScheduledSGD, parallelize
from pretrain.engine.trainer import Task, Trainer, epochs_left
from pretrain.moco.instance_discrimination import InstanceDiscrimination

SHOWN = 6  # images of a process whose views are drawn


@dataclass(eq=False)
class MoCoPretraining(Task):
    """Contrastive steps; a kNN accuracy and a checkpoint that is kept at the end of epochs.

    Args:
        model: a mechanism, on its device.
        loss: one of LOSSES, logits P x (1+K) -> mean over this process's queries.
        batches: of views as `pretrain.data` has them, `model.num_views` of each image and, under
            multi-crop, small ones.
        seed: of the draws that all processes make alike.
        dtype: of mixed precision; None for float32.
        monitor: encoder -> kNN top-1 in percent, the same value on every process; it is switched
            off where it raises a UserError.
        draw_neighbours: what `monitor` has last found to be near, as uint8 RGB pixels H x W x 3;
            None where there is nothing to show.
        knn_every: epochs between two of them; the first is before the first step.
        keep: so many of the newest epochs keep their checkpoints.
        save_every: each epoch of this number keeps its checkpoint for good; 0 for none.
        compilation: whether the encoders are compiled, one of `device.COMPILE`.
        auxiliary_weight: of each loss that the model adds; the log has them without it.
        auxiliary_from: the step from which it counts; before, it is 0.
        conditions: those that the views' crops have to meet, see `MultiCrop`; the share of crops
            that do not is logged.

    Under multi-crop the loss is over all queries, and the log's other values are of the large ones:
    so they compare with those of runs without small crops, which are harder to match.
    """

    model: InstanceDiscrimination
    loss: nn.Module
    optimizer: ScheduledSGD
    batches: FolderSource | ShardSource
    seed: int
    dtype: torch.dtype | None = None
    monitor: Callable[[nn.Module], float] | None = None
    draw_neighbours: Callable[[], np.ndarray | None] | None = None
    knn_every: int = 1
    keep: int = 2
    save_every: int = 0
    compilation: str = "off"
    auxiliary_weight: float = 0.0
    auxiliary_from: int = 0
    conditions: tuple[str, ...] = ()

    group = "pretext"
    first_views = ()  # of the run's first step, until they are drawn
    to_compile = False  # in the first step
    apply_looks = None  # to a batch of crops, where that is compiled, too
    numbered_from = 0  # the number of the first epoch's checkpoint
    ended = None  # what the run goes on from: a file, and its epochs

    measures = ("loss", "acc1", "acc5", "positive_similarity", "negative_similarity", "feature_std")

    def __post_init__(self):
        self.parallel = parallelize(self.model.train())
        self.measures += self.model.auxiliary + self.conditions
        self.device = self.model.pixel_mean.device

    def step(self, batch, step: int) -> torch.Tensor:
        views = [finished(view, self.device, self.apply_looks) for view in batch.views]
        if step == 0 and is_main():
            self.first_views = [view[:SHOWN] for view in views]
        inputs = self.model.inputs(views, batch.indices, self.seed, step)
        if self.to_compile:
            required = self.compilation == "on"
            compile_encoders(self.model, views[0], self.dtype, required, small=views[2:])
            self.to_compile = False
        weight = self.auxiliary_weight if step >= self.auxiliary_from else 0.0
        loss, logits, queries, *auxiliary = contrastive_step(
            self.parallel, self.loss, self.optimizer, inputs, self.dtype, weight
        )
        self.negatives = logits.shape[1] - 1
        large = slice(len(views[0]))
        metrics = pretext_metrics(loss, logits[large], queries[large], self.model.temperature)
        further = [term.detach().view(1) for term in auxiliary]
        if self.conditions:
            further.append(upload(free_shares(batch.free_crops, self.conditions), self.device))
        return torch.cat([metrics, *further])

    def log_values(self, seen: int) -> dict[str, float]:
        return {"chance_loss": self.loss.chance(self.negatives)} | self.model.memory_fill(seen)

    def pictures(self) -> dict[str, Callable[[], np.ndarray]]:
        views, self.first_views = self.first_views, ()
        return {"pretext/views": partial(draw_views, views)} if views else {}

    def to_come(self, trainer: Trainer) -> dict[str, int]:
        left = {"checkpoint": trainer.epochs - trainer.epoch}
        if self.monitor:
            left["kNN"] = epochs_left(trainer.epoch, trainer.epochs, self.knn_every)
        return left

    def before_training(self, trainer: Trainer) -> None:
        steps = trainer.last_step - trainer.step
        self.to_compile = settle_compilation(self.compilation, self.device, steps)
        self.apply_looks = compiled_looks() if self.to_compile else None
        if self.monitor and trainer.step == 0:
            self.record_knn(trainer)
        if self.ended == (trainer.output / checkpoints.LAST, trainer.epoch):
            self.close_epoch(trainer, trainer.epoch)

    def after_epoch(self, trainer: Trainer, number: int) -> None:
        trainer.save()
        self.close_epoch(trainer, number)

    def close_epoch(self, trainer: Trainer, number: int) -> None:
        """What follows the checkpoint of an epoch's end, also when a kill came between the two."""
        if trainer.step_in_epoch == 0 and is_main():
            kept = self.keep, self.save_every, self.numbered_from
            checkpoints.keep_epoch(trainer.output, number, *kept)
        if self.monitor and (number % self.knn_every == 0 or number == trainer.epochs):
            records = (r for r in trainer.log.kept if r["step"] == trainer.step)
            if not from_main(any("knn_top1" in record for record in records)):
                self.record_knn(trainer)

    def record_knn(self, trainer: Trainer) -> None:
        """Log the kNN accuracy, under the main process's running statistics."""
        broadcast_buffers(self.model.encoder_q)
        try:
            with trainer.timed("kNN"):
                top1 = self.monitor(self.model.encoder_q)
        except UserError as error:  # on every process alike
            print_on_main(f"warning: the kNN monitor is switched off: {error}")
            self.monitor = None
            return
        epochs = trainer.epochs_done
        line = f"epoch {epochs:g}/{trainer.epochs}  kNN top-1 {top1:.2f} %"
        trainer.record({"epoch": epochs, "knn_top1": top1}, line)
        if self.draw_neighbours:
            trainer.log.picture(trainer.step, "features/neighbours", self.draw_neighbours)

    def state(self) -> dict:
        return {
            "loss": self.loss.state_dict(),
            "rng": checkpoints.rng_states(),
            "data": self.batches.state(),
            "numbered_from": self.numbered_from,
        }

    def load_state(self, checkpoint: Checkpoint) -> None:
        path, state = checkpoint
        within = state.get("step_in_epoch") or state.get("restarted")
        self.ended = None if within or not state["epoch"] else (path, state["epoch"])
        self.numbered_from = checkpoints.numbered_from(state)
        saved = state.get("loss", {})
        wrong = checkpoints.misfit(self.loss.state_dict(), saved)
        if wrong:
            raise UserError(f"cannot resume from {path}: its entry 'loss': {wrong}")
        self.loss.load_state_dict(saved)
        self.batches.resume(state.get("data", {}), path)
        if rank() < len(state.get("rng", [])):
            checkpoints.restore_rng(state["rng"][rank()])


def contrastive_step(
    model: nn.Module,
    loss: nn.Module,
    optimizer: ScheduledSGD,
    inputs: tuple[torch.Tensor, ...],
    dtype: torch.dtype | None = None,
    auxiliary_weight: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """One iteration of Algorithm 1: loss, SGD on the encoder, keys into the queue.

    Args:
        model: an InstanceDiscrimination, parallelized or not.
        loss: one of LOSSES, logits -> mean over this process's queries.
        inputs: the arguments of the model's forward pass.
        dtype: of mixed precision; None for float32.
        auxiliary_weight: of each loss that the model adds.
    Returns:
        the loss, for the log logits P x (1+K) and queries P x C, and each loss that was added.
    """
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not None):
        logits, keys, queries, *auxiliary = model(*inputs)
    value = loss(logits)
    optimizer.minimize(sum((auxiliary_weight * term for term in auxiliary), value))
    getattr(model, "module", model).enqueue(keys)
    return value, logits, queries, *auxiliary


@torch.no_grad()
def pretext_metrics(
    loss: torch.Tensor, logits: torch.Tensor, queries: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The `measures` of MoCoPretraining, as a tensor that stays on the device.

    `feature_std` is the standard deviation over the batch, averaged over dimensions: 0 is collapse,
    1/sqrt(C) is what features spread evenly over the sphere have.

    Args:
        logits: N x (1+K), the positive at index 0; under multi-crop those of the large views.
        queries: N x C, likewise.
        temperature: by which the logits were divided.
    """
    better = (logits[:, 1:] > logits[:, :1]).sum(dim=1)  # negatives ahead of the positive, N
    similarity = logits.float() * temperature
    return torch.stack(
        [
            loss.detach().float(),
            100.0 * (better < 1).float().mean(),
            100.0 * (better < 5).float().mean(),
            similarity[:, 0].mean(),
            similarity[:, 1:].mean(),
            queries.float().std(dim=0, correction=0).mean(),
        ]
    )
