"""Classifiers on an encoder: a linear one on its frozen features, or all of it fine-tuned.

The linear protocol of Section 4.1 and the fine-tuning of A.6 and A.7 (arXiv:1911.05722).

Shape legend:
    N: images of this process in a step     M: images of val
    D: pooled features                      C: classes
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.gpus import upload
from moco_det.common.processes import broadcast_buffers, rank, world_size
from pretrain.data.images import DistributedBatchSampler, Loading
from pretrain.data.labelled import LabelledBatches
from pretrain.data.listing import check_unchanged
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.optimization import ScheduledSGD, parallelize
from pretrain.engine.trainer import Task, Trainer, epochs_left
from pretrain.evaluation.features import SplitFeatures, encode, extract, pooled
from pretrain.moco.grouped_batchnorm import group_batchnorm

BEST = "checkpoint_best.pth.tar"


@dataclass(eq=False)
class Classification(Task):
    """Cross-entropy of labelled batches; accuracy on val and a checkpoint after epochs.

    A protocol says how logits and the features of val come about.

    Args:
        model: an encoder that ends with the classifier `fc`, D -> C.
        batches: images N x S x S x 3 or features N x D, and labels N, -1 for unreadable ones.
        dtype: of mixed precision in the encoder; None for float32.
        eval_every: epochs between two validations.
        classes: their names, in the order of the classifier's outputs, for checkpoints.
        data: fingerprint of train.
    """

    model: nn.Module
    optimizer: ScheduledSGD
    batches: "LabelledBatches | FeatureBatches"
    dtype: torch.dtype | None
    eval_every: int
    classes: list[str] = field(kw_only=True)
    data: dict = field(kw_only=True)

    measures = ("loss", "acc1", "acc5")
    best = -1.0
    name: ClassVar[str]  # of the protocol, for messages
    finetune: ClassVar[bool]  # the flag that it goes by

    def trained(self) -> nn.Module:
        """Make the part of the model ready that is to be trained."""
        raise NotImplementedError

    def __post_init__(self):
        self.parallel = parallelize(self.trained())
        self.device = self.model.fc.weight.device

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """N x C, fp32, of the images or features of a batch."""
        raise NotImplementedError

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features M x D and labels M of val, equal on all processes."""
        raise NotImplementedError

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor:
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        logits = self.logits(images)
        # A mean over all N, readable or not: the mean over processes is then that of the batch.
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)
        self.optimizer.minimize(loss)
        correct = correct_within(logits.detach(), labels)
        return torch.stack([loss.detach(), *(100.0 * correct / len(labels))])

    def after_epoch(self, trainer: Trainer, number: int) -> None:
        if number % self.eval_every and number != trainer.epochs:
            return
        with trainer.timed("validation"):
            values = {"epoch": number} | evaluate(self.model.fc, *self.validation())
        better = values["val_acc1"] > self.best
        self.best = max(self.best, values["val_acc1"])
        trainer.record(values, validation_line(trainer.epochs, values, self.best))
        # In this order: a kill between the two repeats the epoch, which writes the same best again.
        if better:
            trainer.save(BEST)
        trainer.save()

    def to_come(self, trainer: Trainer) -> dict[str, int]:
        """A checkpoint after each validation; the best ones' are not foreseen."""
        left = epochs_left(trainer.epoch, trainer.epochs, self.eval_every)
        return {"validation": left, "checkpoint": left}

    def state(self) -> dict:
        """All draws are functions of the seed and the position, so no generator is kept."""
        return {"best_acc1": self.best, "classes": self.classes, "data": self.data}

    def load_state(self, checkpoint: Checkpoint) -> None:
        path, state = checkpoint
        self.best = float(state.get("best_acc1", 0.0))
        if state.get("config", {}).get("finetune", False) != self.finetune:
            raise UserError(f"{path} is of another protocol than {self.name}: mind --finetune")
        check_unchanged(state.get("data"), self.data, path)


@dataclass(eq=False)
class LinearProbe(Classification):
    """The backbone must not change: only the classifier is trained.

    Args:
        val: its features M x D and labels M, computed once.
        backbone: images -> features N x D; None where the batches hold features already.
    """

    val: tuple[torch.Tensor, torch.Tensor]
    backbone: nn.Module | None

    name = "the linear protocol"
    finetune = False

    def trained(self) -> nn.Module:
        self.frozen = frozen_state(self.model)
        return self.model.fc.requires_grad_(True)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        features = images if self.backbone is None else extract(self.backbone, images, self.dtype)
        return self.parallel(features)

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        check_frozen(self.model, self.frozen)
        return self.val


@dataclass(eq=False)
class FineTuning(Classification):
    """Gradients reach all weights, under batch statistics.

    These are those of BN groups, as in pretraining: about 32 images each however many processes
    there are, as on the 8 GPUs of a batch of 256. Running statistics are those of the first group.

    Args:
        val: features under the weights as they are when asked.
        bn_groups: of this process.
    """

    val: SplitFeatures
    bn_groups: int

    name = "fine-tuning"
    finetune = True

    def trained(self) -> nn.Module:
        return group_batchnorm(self.model.requires_grad_(True), self.bn_groups).train()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return encode(self.parallel, images, self.dtype)

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Under the main process's running statistics."""
        broadcast_buffers(self.model)
        features = self.val.compute(pooled(self.model.eval()))
        self.model.train()
        return features


class FeatureBatches:
    """Batches of features N x D, computed once, and their labels N.

    Args:
        features, labels: of a split, M x D and M.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, loading: Loading):
        self.features = features
        self.labels = labels
        self.samples = len(labels)
        self.sampler = DistributedBatchSampler(
            self.samples, loading.batch_size, rank(), world_size(), loading.seed
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.start = self.sampler.start

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for keys in self.sampler:
            indices = upload(torch.tensor([index for _, index in keys]), self.labels.device)
            yield self.features[indices], self.labels[indices]


@torch.no_grad()
def evaluate(fc: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean loss, top-1 and top-5 in percent of a classifier on features M x D and labels M of val,
    under their names in the log."""
    sums = torch.zeros(3, device=features.device)
    for some, targets in zip(features.split(1024), labels.split(1024), strict=True):
        logits = fc(some)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss, *correct_within(logits, targets)])
    loss, top1, top5 = (sums / len(labels)).tolist()
    return {"val_loss": loss, "val_acc1": 100 * top1, "val_acc5": 100 * top5}


def validation_line(epochs: int, values: dict[str, float], best: float) -> str:
    """One line about what `evaluate` gave and its "epoch"; `best`: the highest top-1 so far."""
    return (
        f"epoch {values['epoch']}/{epochs}  val top-1 {values['val_acc1']:.2f} % "
        f"top-5 {values['val_acc5']:.2f} %  loss {values['val_loss']:.4f}  best top-1 {best:.2f} %"
    )


def correct_within(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of N x C logits have their label first, and among the first five: two counts."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack([hits[:, :1].sum(), hits.sum()]).float()


def load_classifier(
    encoder: nn.Module, checkpoint: Checkpoint, arch: str, frozen_from: str = ""
) -> None:
    """Load a run's backbone and classifier. Raises UserError that names what does not fit.

    Args:
        frozen_from: name of the weights that `encoder` has, if the run's backbone must equal them.
    """
    path, state = checkpoint
    checkpoints.check_arch(checkpoint, arch)
    before = frozen_state(encoder)
    try:
        encoder.load_state_dict(checkpoints.weights(state))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} is no classifier of this data and -a {arch}: {reason}") from error
    if frozen_from and changed(encoder, before):
        raise UserError(f"{path} is of another backbone than --pretrained {frozen_from}")


def check_classes(checkpoint: Checkpoint, classes: list[str]) -> None:
    """UserError where a run's classifier tells other classes apart than those of the data, or
    calls them in another order. Earlier versions wrote no names."""
    path, state = checkpoint
    before = state.get("classes", classes)
    if before == classes:
        return
    for other, names, where in ((classes, before, "the checkpoint"), (before, classes, "DATA")):
        odd = [name for name in names if name not in other]
        if odd:
            raise UserError(
                f"{path} has {len(before)} classes, DATA {len(classes)}, and they are not the "
                f"same: {where} alone has {', '.join(odd[:5])}"
            )
    raise UserError(f"{path} has the classes of DATA in another order")


def frozen_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that must not change: weights and batch statistics below the classifier."""
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}
    return copy.deepcopy(state)


def changed(encoder: nn.Module, frozen: dict[str, torch.Tensor]) -> list[str]:
    """The names of what differs from `frozen`, in any bit."""
    state = encoder.state_dict()
    return [name for name, value in frozen.items() if not torch.equal(state[name], value)]


def check_frozen(encoder: nn.Module, frozen: dict[str, torch.Tensor]) -> None:
    """The official code's sanity check. Raises RuntimeError: accuracies would mean nothing."""
    names = changed(encoder, frozen)
    if names:
        raise RuntimeError(f"the frozen backbone changed in training: {names[0]}")
