"""The training loop: batches in, checkpoints and metrics out."""

import inspect
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.processes import StopRequest, rank, workers_per_process, world_size
from pretrain.data.sources import build_source
from pretrain.engine import checkpoints
from pretrain.engine.diagnosis import Doctor, Finding
from pretrain.engine.metrics import MetricMeter, RunLog, pretext_metrics, progress_line
from pretrain.engine.optimization import AMP_DTYPES, build_schedule
from pretrain.evaluation.weighted_knn import KnnMonitor
from pretrain.moco.instance_discrimination import InstanceDiscrimination
from pretrain.moco.losses import LOSSES
from pretrain.moco.mechanisms import build_mechanism

# torch 2.14 renamed it, and warns of the old name; under the new one, buffers are broadcast once,
# by the constructor, which changes nothing where all processes have loaded the same.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def train(args, device: torch.device) -> None:
    """Pretrain from the flags `args` on `device`; one of the run's processes."""
    trainer = Trainer(args, device)
    if trainer.step == 0:
        trainer.monitor()
    for epoch in range(trainer.epoch, trainer.epochs):
        trainer.train_epoch(epoch)
        trainer.save(numbered=trainer.step_in_epoch == 0)
        if args.knn_every and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == trainer.epochs):
            trainer.monitor()


class Trainer:
    """Model, data, optimizer and position of one run, in one of its processes."""

    def __init__(self, args, device: torch.device):
        self.args = args
        self.device = device
        self.output = Path(args.output)
        self.stop = StopRequest().__enter__()
        make_output_folder(self.output)
        resumed_from, state = find_checkpoint(args.resume, self.output)
        self.seed = agree_on_seed(args.seed, state, device)
        for seed_generator in (torch.manual_seed, random.seed, np.random.seed):
            seed_generator(self.seed)
        torch.backends.cudnn.benchmark = args.seed is None
        torch.backends.cudnn.deterministic = args.seed is not None

        self.source = build_source(args, device, self.seed)
        self.model = build_mechanism(args, self.source.samples)
        self.model = self.model.to(device, memory_format=torch.channels_last)
        self.loss = LOSSES[args.loss]().to(device)
        self.optimizer = build_optimizer(self.model, args.lr, args.momentum, args.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.learning_rate = build_schedule(args)
        self.epoch, self.step_in_epoch, self.step = args.start_epoch, 0, 0
        if state is not None:
            self._resume(state, resumed_from)
        self.epochs = self._count_epochs()
        self.parallel = parallelize(self.model)
        self.unreadable: set[str] = set()
        self.log = RunLog(self.output, self.step)
        self.doctor = Doctor(self.output)
        for record in self.log.kept:
            self.doctor.hear(record)
        self.window = MetricMeter(device)
        self.knn = None
        data = Path(args.data)
        if args.knn_every and KnnMonitor.applies_to(data):
            workers = workers_per_process(args.workers)
            self.knn = KnnMonitor(data, args.image_size, workers, device)
        self._describe(resumed_from)
        self.announce(self.record({"flags": self._flags()}))

    def steps_left(self) -> int:
        """From the run's position to its end, which `--iterations` may put within an epoch."""
        if self.args.iterations:
            return max(0, self.args.iterations - self.step)
        epochs = self.args.epochs - self.epoch
        return max(0, epochs * self.source.steps_per_epoch - self.step_in_epoch)

    def _count_epochs(self) -> int:
        """The number of the epoch that the run ends with or in, counted from 1.

        An epoch that was left after its last step, before it was closed, is still to come.
        """
        steps = self.source.steps_per_epoch
        if not self.steps_left() and self.step_in_epoch < steps:
            return self.epoch
        return self.epoch + math.ceil((self.step_in_epoch + self.steps_left()) / steps)

    def train_epoch(self, epoch: int) -> None:
        """The rest of epoch `epoch` from where the run stands."""
        self.epoch = epoch
        self.source.start(epoch, self.step_in_epoch)
        self.model.train()
        self.window.reset()
        batches = iter(self.source)
        steps = min(self.source.steps_per_epoch, self.step_in_epoch + self.steps_left())
        while self.step_in_epoch < steps:
            begun = time.perf_counter()
            im_q, im_k, unreadable = next(batches)
            waited = time.perf_counter() - begun
            self.check_images(unreadable, im_q)
            self.train_step([view for view in (im_q, im_k) if view is not None], waited)
            self.step_in_epoch += 1
            self.step += 1
            self.report_and_save()
        if self.step_in_epoch == self.source.steps_per_epoch:
            self.epoch, self.step_in_epoch = epoch + 1, 0

    def train_step(self, views: list[torch.Tensor], waited: float) -> None:
        """One step on this process's views (N, S, S, 3), uint8."""
        self.set_learning_rate()
        views = [view.to(self.device, non_blocking=True) for view in views]
        places = self.source.places(self.step_in_epoch)
        inputs = self.model.inputs(views, places, self.seed, self.step)
        loss, logits, queries = contrastive_step(
            self.parallel, self.loss, self.optimizer, self.scaler, inputs, self.args.amp
        )
        self.negatives = logits.shape[1] - 1
        self.window.add(pretext_metrics(loss, logits, queries, self.args.moco_t), waited)

    def report_and_save(self) -> None:
        """What happens between two steps: the log, a checkpoint that is due, a request to stop."""
        steps, frequency = self.source.steps_per_epoch, self.args.print_freq
        due = self.step_in_epoch % frequency == 0 or self.step_in_epoch == steps
        due = due or not self.steps_left()
        saving = self.args.save_steps and self.step % self.args.save_steps == 0
        if due or saving or self.step == 1:  # before any save: a NaN must not reach a checkpoint
            self.report()
        if saving:
            self.save(numbered=False)
        # Several processes must agree on the step to stop at, which costs a message: seldom.
        if (due or world_size() == 1) and self.stop.agreed():
            if self.window.steps:
                self.report()
            self.save(numbered=False)
            self.log.message(f"SIGTERM: saved {self.output / checkpoints.LAST} at step {self.step}")
            raise SystemExit(EXIT_INTERRUPTED)

    def report(self) -> None:
        """Log the window's means and begin a new one. Raises UserError when the loss is NaN."""
        args, steps = self.args, self.source.steps_per_epoch
        values = {"epoch": self.epoch + self.step_in_epoch / steps}
        values |= self.window.means(args.batch_size) | {
            "lr": self.optimizer.param_groups[0]["lr"],
            "chance_loss": self.loss.chance(self.negatives),
        }
        values |= self.model.memory_fill(self.step * args.batch_size)
        self.window.reset()
        findings = self.record(values)
        if not math.isfinite(values["loss"]):
            raise UserError(findings[0].text)
        position = (self.epoch, self.epochs, self.step_in_epoch, steps, self.steps_left())
        self.log.message(progress_line(*position, values))
        self.announce(findings)

    def record(self, values: dict) -> list[Finding]:
        """Write `values` to the log; what they newly say of the run's health."""
        self.log.write(self.step, values)
        return self.doctor.hear({"step": self.step, **values})

    def announce(self, findings: list[Finding]) -> None:
        for finding in findings:
            self.log.message(str(finding))

    def monitor(self) -> None:
        """Log the kNN accuracy, where the data has labels for it."""
        if self.knn is None:
            return
        if world_size() > 1:
            for buffer in self.model.encoder_q.buffers():
                dist.broadcast(buffer, 0)
        top1 = self.knn.top1(self.model.encoder_q)
        epochs = self.epoch + self.step_in_epoch / self.source.steps_per_epoch
        findings = self.record({"epoch": epochs, "knn_top1": top1})
        self.log.message(f"epoch {epochs:g}/{self.epochs}  kNN top-1 {top1:.2f} %")
        self.announce(findings)

    def save(self, numbered: bool = True) -> None:
        """Write the last checkpoint, at the end of an epoch a `numbered` one too. Collective."""
        state = {
            "epoch": self.epoch,
            "arch": self.args.arch,
            "state_dict": checkpoints.model_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "step_in_epoch": self.step_in_epoch,
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict(),
            "rng": checkpoints.rng_states(),
            "data": self.source.state(),
            "config": vars(self.args) | {"seed": self.seed},
        }
        if rank() != 0:
            return
        if numbered:
            checkpoints.save_epoch(state, self.output, self.args.keep, self.args.save_every)
        else:
            checkpoints.save(state, self.output / checkpoints.LAST)

    def set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * self.learning_rate(self.epoch, self.step)

    def check_images(self, unreadable: list[str], images: torch.Tensor | None) -> None:
        """Warn of each unreadable file once. Raises UserError beyond --max-unreadable."""
        for message in sorted(set(unreadable) - self.unreadable):
            self.unreadable.add(message)
            print(f"warning: unreadable image {len(self.unreadable)}: {message}", flush=True)
        total = self.source.samples
        if images is None or len(self.unreadable) > self.args.max_unreadable * total:
            raise UserError(
                f"{len(self.unreadable)} of {total} images are unreadable, more than "
                f"--max-unreadable {self.args.max_unreadable} allows; the last: {unreadable[-1]}"
            )

    def _resume(self, state: dict, path: Path) -> None:
        """Continue where `state` stopped; a state of the official code continues at its epoch."""
        check_method(self.args, state, path)
        checkpoints.load_model(self.model, state, path, self.args.arch)
        self.loss.load_state_dict(state.get("loss", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = max(self.epoch, state["epoch"])
        self.step_in_epoch = state.get("step_in_epoch", 0)
        self.step = state.get("step", self.epoch * self.source.steps_per_epoch)
        self.source.resume(state.get("data", {}), path)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        before = state.get("config", {}).get("batch_size", self.args.batch_size)
        if self.step_in_epoch and before != self.args.batch_size:
            raise UserError(
                f"{path} stopped within an epoch of batches of {before}; resume it with "
                f"--batch-size {before}, the position is counted in these"
            )
        if rank() < len(state.get("rng", [])):
            checkpoints.restore_rng(state["rng"][rank()])

    def _flags(self) -> dict:
        """The flags of this start, and what else the doctor needs to know of it."""
        cores = len(os.sched_getaffinity(0))
        return vars(self.args) | {"cores": cores, "last_step": self.step + self.steps_left()}

    def _describe(self, resumed_from: Path | None) -> None:
        args, groups = self.args, self.model.bn_groups
        local = args.batch_size // world_size()
        self.log.message(
            f"{self.source.describe()}, {self.source.steps_per_epoch} steps an epoch; "
            f"global batch {args.batch_size} = {world_size()} process(es) x {groups} BN group(s) "
            f"x {local // groups}; {self.device}, seed {self.seed}, output {self.output}"
        )
        shuffled = args.shuffle_bn and self.model.view_count == 2
        self.log.message(
            f"{args.mechanism}, {args.loss}, {'with' if shuffled else 'without'} shuffled BN"
        )
        if resumed_from:
            self.log.message(f"resumed {resumed_from} at epoch {self.epoch}, step {self.step}")
        if args.knn_every and self.knn is None:
            self.log.message(f"no kNN monitor: {args.data} lacks class folders in train/ and val/")


def contrastive_step(
    model: InstanceDiscrimination | DistributedDataParallel,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    inputs: tuple[torch.Tensor, ...],
    amp: str = "none",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One iteration of Algorithm 1: loss, SGD on the encoder, keys into the memory.

    Args:
        loss: one of LOSSES, logits -> mean over this process's queries.
        inputs: the arguments of the model's forward pass.
        amp: a key of AMP_DTYPES.
    Returns:
        the loss, and for the log logits N x (1+K) and queries N x C.
    """
    dtype = AMP_DTYPES[amp]
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not None):
        logits, keys, queries = model(*inputs)
    value = loss(logits)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    getattr(model, "module", model).remember(keys)
    return value, logits, queries


def parallelize(model: InstanceDiscrimination) -> InstanceDiscrimination | DistributedDataParallel:
    """Average gradients over the processes, where there are several.

    Buffers are not broadcast in steps: the queue and the bank are equal everywhere by construction,
    and running statistics are read from rank 0 only.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, **OWN_BUFFERS, gradient_as_bucket_view=True)


def build_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float):
    """SGD with decay on all parameters; MoCo's key encoder's come along without gradients, as in
    the official code, so that optimizer states can be exchanged."""
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)


def make_output_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output {folder}: {error.strerror}") from error


def find_checkpoint(resume: str, output: Path) -> tuple[Path | None, dict | None]:
    """`resume`: a path, "auto" for the last checkpoint of `output` if there is one, or ""."""
    path = output / checkpoints.LAST if resume == "auto" else Path(resume)
    if not resume or (resume == "auto" and not path.exists()):
        return None, None
    return path, checkpoints.load(path)


def check_method(args, state: dict, path: Path) -> None:
    """Raises UserError where the checkpoint is that of another mechanism or loss."""
    config = state.get("config", {})  # the official code writes none
    for flag, official in (("mechanism", "moco"), ("loss", "infonce")):
        before = config.get(flag, official)
        if before != getattr(args, flag):
            raise UserError(f"{path} was trained with --{flag} {before}; resume it with that")


def agree_on_seed(seed: int | None, state: dict | None, device: torch.device) -> int:
    """The flag's seed, else that of the resumed run, else a random one; equal on all processes."""
    if seed is None and state is not None:
        seed = state.get("config", {}).get("seed")
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    if world_size() > 1:
        shared = torch.tensor(seed, device=device)
        dist.broadcast(shared, 0)
        seed = int(shared)
    return seed
