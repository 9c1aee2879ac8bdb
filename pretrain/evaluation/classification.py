"""Training a classifier on an encoder: what the linear protocol and fine-tuning share.

Shape legend:
    N: images of this process in a step     M: images of val
    D: pooled features                      C: classes
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.processes import StopRequest, print_on_main, rank, world_size
from pretrain.engine import checkpoints
from pretrain.engine.metrics import MetricMeter, RunLog, pace
from pretrain.engine.optimization import step_decay
from pretrain.engine.training import (
    agree_on_seed,
    build_optimizer,
    find_checkpoint,
    make_output_folder,
    parallelize,
)
from pretrain.evaluation.features import RANDOM, load_encoder
from pretrain.evaluation.splits import LabelledSplits

BEST = "checkpoint_best.pth.tar"
LAST = (checkpoints.LAST,)
# In this order: a kill between the two repeats the epoch, which writes the same best again.
LAST_AND_BEST = (BEST, checkpoints.LAST)
MEASURES = ("loss", "acc1", "acc5")


class ClassifierTraining:
    """Encoder, data and position of one run, in one of its processes.

    A protocol adds what is trained, and from what:
        name              of the protocol, for messages
        prepare_encoder() what is to be done once the weights are loaded
        prepare_training()  reads the training data; returns the module to be trained, inputs of a
                          step -> logits N x C
        validation()      features M x D and labels M of val, for the classifier `encoder.fc`
        check()           what must hold before an evaluation
    """

    name = ""

    def __init__(self, args, device: torch.device):
        self.args = args
        self.device = device
        self.output = Path(args.output)
        resumed_from, state = find_checkpoint(args.resume, self.output)
        if args.evaluate and state is None:
            raise UserError("--evaluate needs the classifier of a run: pass --resume PATH")
        self.seed = agree_on_seed(args.seed, state, device)
        torch.manual_seed(self.seed)
        torch.backends.cudnn.benchmark = args.seed is None
        torch.backends.cudnn.deterministic = args.seed is not None

        self.data = LabelledSplits(args, device, self.seed)
        self.encoder = self._build_encoder(state, resumed_from)
        self.epoch, self.step_in_epoch, self.step, self.best = args.start_epoch, 0, 0, -1.0
        if not args.evaluate:
            self.stop = StopRequest().__enter__()
            trained = self.prepare_training()
            self.model = parallelize(trained)
            self.optimizer = build_optimizer(trained, args.lr, args.momentum, args.weight_decay)
            # Features are fp32 and so is a classifier on them: no gradient needs scaling there.
            scaled = args.amp == "fp16" and args.finetune
            self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
            self.batches = self.data.batches
        if state is not None:
            self._resume(state, resumed_from)
        if not args.evaluate:
            make_output_folder(self.output)
            self.log = RunLog(self.output, self.step)
            self.window = MetricMeter(device, MEASURES)

    def train(self) -> None:
        for epoch in range(self.epoch, self.args.epochs):
            self.train_epoch(epoch)
            if self.epoch % self.args.eval_every == 0 or self.epoch == self.args.epochs:
                self.check()
                accuracy = self.evaluate()
                better = accuracy > self.best
                self.best = max(self.best, accuracy)
                self.save(LAST_AND_BEST if better else LAST)

    def train_epoch(self, epoch: int) -> None:
        """The rest of epoch `epoch` from where the run stands."""
        self.epoch = epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * step_decay(epoch, self.args.schedule)
        self.batches.start(epoch, self.step_in_epoch)
        self.window.reset()
        batches = self.data.training()
        while self.step_in_epoch < self.batches.steps_per_epoch:
            self.train_step(*next(batches))
            self.step_in_epoch += 1
            self.step += 1
            self.report_and_save()
        self.epoch, self.step_in_epoch = epoch + 1, 0

    def train_step(self, inputs: torch.Tensor, labels: torch.Tensor, waited: float) -> None:
        """One step of SGD on this process's inputs, N of them, and labels N."""
        logits = self.model(inputs)
        # A mean over all N, readable or not: the mean over processes is then that of the batch.
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = correct_within(logits.detach(), labels)
        self.window.add(torch.stack([loss.detach(), *(100.0 * correct / len(labels))]), waited)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Top-1 accuracy on val in percent, equal on all processes; logged with the others."""
        features, labels = self.validation()
        sums = torch.zeros(3, device=self.device)
        for some, truth in zip(features.split(1024), labels.split(1024), strict=True):
            logits = self.encoder.fc(some)
            loss = F.cross_entropy(logits, truth, reduction="sum")
            sums += torch.stack([loss, *correct_within(logits, truth)])
        loss, top1, top5 = (sums / len(labels)).tolist()
        top1, top5 = 100 * top1, 100 * top5
        values = {"epoch": self.epoch, "val_loss": loss, "val_acc1": top1, "val_acc5": top5}
        if not self.args.evaluate:
            self.log.write(self.step, values)
        print_on_main(
            f"epoch {self.epoch}/{self.args.epochs}  val top-1 {top1:.2f} % top-5 {top5:.2f} %  "
            f"loss {loss:.4f}  best top-1 {max(top1, self.best):.2f} %"
        )
        return top1

    def check(self) -> None:
        """Nothing, unless the protocol says so."""

    def report_and_save(self) -> None:
        """What happens between two steps: the log, a checkpoint that is due, a request to stop."""
        args, steps = self.args, self.batches.steps_per_epoch
        due = self.step_in_epoch % args.print_freq == 0 or self.step_in_epoch == steps
        saving = args.save_steps and self.step % args.save_steps == 0
        if due or saving or self.step == 1:
            self.report()
        if saving:
            self.save(LAST)
        if (due or world_size() == 1) and self.stop.agreed():
            if self.window.steps:
                self.report()
            self.save(LAST)
            print_on_main(f"SIGTERM: saved {self.output / checkpoints.LAST} at step {self.step}")
            raise SystemExit(EXIT_INTERRUPTED)

    def report(self) -> None:
        """Log the window's means and begin a new one. Raises UserError when the loss is NaN."""
        args, steps = self.args, self.batches.steps_per_epoch
        values = {"epoch": self.epoch + self.step_in_epoch / steps}
        values |= self.window.means(args.batch_size)
        values |= {"lr": self.optimizer.param_groups[0]["lr"]}
        self.window.reset()
        if not math.isfinite(values["loss"]):
            raise UserError(f"the loss is {values['loss']} at step {self.step}: lower --lr")
        self.log.write(self.step, values)
        left = (args.epochs - self.epoch) * steps - self.step_in_epoch
        print_on_main(
            f"epoch {self.epoch + 1}/{args.epochs} [{self.step_in_epoch}/{steps}]  "
            f"loss {values['loss']:.4f}  acc@1 {values['acc1']:.2f} acc@5 {values['acc5']:.2f}  "
            f"lr {values['lr']:.4g}  {pace(left, values)}"
        )

    def save(self, names: tuple[str, ...]) -> None:
        """Write the state under each of `names`, in their order; the main process only.

        All draws are functions of the seed and the position, so no generator is kept.
        """
        if rank() != 0:
            return
        state = {
            "epoch": self.epoch,
            "arch": self.args.arch,
            "state_dict": checkpoints.model_state(self.encoder),
            "best_acc1": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "step_in_epoch": self.step_in_epoch,
            "config": vars(self.args) | {"seed": self.seed},
        }
        for name in names:
            checkpoints.save(state, self.output / name)

    def _build_encoder(self, state: dict | None, path: Path | None):
        """The encoder with a new classifier, or the one of `state`, on the device.

        An evaluation needs no --pretrained: the run's checkpoint holds the backbone as well.
        """
        args, source = self.args, self.args.pretrained
        if not source and not args.evaluate:
            raise UserError("pass --pretrained CHECKPOINT, or `random` for an untrained backbone")
        classes = len(self.data.classes)
        self.encoder = load_encoder(source or RANDOM, args.arch, classes, args.small_stem)
        self.prepare_encoder()
        if state is not None:
            self.load(state, path)
        return self.encoder.to(self.device, memory_format=torch.channels_last)

    def load(self, state: dict, path: Path) -> None:
        """Backbone and classifier of a run. Raises UserError that names what does not fit."""
        load_classifier(self.encoder, state, path, self.args.arch)

    def _resume(self, state: dict, path: Path) -> None:
        """Continue where `state` stopped; a state of the official code continues at its epoch."""
        self.epoch, self.best = max(self.epoch, state["epoch"]), float(state.get("best_acc1", 0.0))
        self.step_in_epoch = state.get("step_in_epoch", 0)
        if self.args.evaluate:
            return
        config = state.get("config", {})
        if config.get("finetune", False) != self.args.finetune:
            raise UserError(f"{path} is of another protocol than {self.name}: mind --finetune")
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.step = state.get("step", self.epoch * self.batches.steps_per_epoch)
        before = config.get("batch_size", self.args.batch_size)
        if self.step_in_epoch and before != self.args.batch_size:
            raise UserError(f"{path} stopped within an epoch: resume it with --batch-size {before}")
        print_on_main(f"resumed {path} at epoch {self.epoch}, step {self.step}")


def correct_within(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of N x C logits have their label first, and among the first five: two counts."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack([hits[:, :1].sum(), hits.sum()]).float()


def load_classifier(encoder: torch.nn.Module, state: dict, path: Path, arch: str) -> None:
    """Load a run's backbone and classifier. Raises UserError that names what does not fit."""
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} holds a {state['arch']}, not a {arch}: pass -a {state['arch']}")
    try:
        encoder.load_state_dict(
            {k.removeprefix("module."): v for k, v in state["state_dict"].items()}
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} is no classifier of this data and -a {arch}: {reason}") from error
