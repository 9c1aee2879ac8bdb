"""The training loop: batches in, checkpoints and metrics out."""

import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from pretrain import checkpoints
from pretrain.encoders import build_encoder
from pretrain.errors import EXIT_INTERRUPTED, UserError
from pretrain.images import (
    GlobalBatches,
    TwoViews,
    build_loader,
    collate_views,
    find_images,
    training_folder,
)
from pretrain.knn_monitor import KnnMonitor
from pretrain.momentum_contrast import MoCo, choose_bn_groups, key_order, rank, world_size
from pretrain.processes import StopRequest
from pretrain.progress import RunLog, Window, pretext_metrics, progress_line
from pretrain.views import RandomView

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(args, device: torch.device) -> None:
    """Pretrain from the flags `args` on `device`; one of the run's processes."""
    trainer = Trainer(args, device)
    if trainer.step == 0:
        trainer.monitor(0)
    for epoch in range(trainer.epoch, args.epochs):
        trainer.train_epoch(epoch)
        trainer.save()
        if args.knn_every and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            trainer.monitor(epoch + 1)


class Trainer:
    """Model, data, optimizer and position of one run, in one of its processes."""

    def __init__(self, args, device: torch.device):
        self.args = args
        self.device = device
        self.output = Path(args.output)
        self.stop = StopRequest()
        make_output_folder(self.output)
        resumed_from, state = find_checkpoint(args.resume, self.output)
        self.seed = agree_on_seed(args.seed, state, device)
        for seed_generator in (torch.manual_seed, random.seed, np.random.seed):
            seed_generator(self.seed)
        torch.backends.cudnn.benchmark = args.seed is None
        torch.backends.cudnn.deterministic = args.seed is not None

        self.model = self._build_model()
        self.loader, self.batches = self._build_data()
        self.optimizer = build_optimizer(self.model, args.lr, args.momentum, args.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.epoch, self.step_in_epoch, self.step = args.start_epoch, 0, 0
        if state is not None:
            self._resume(state, resumed_from)
        self.parallel = parallelize(self.model)
        self.unreadable: set[str] = set()
        self.log = RunLog(self.output, self.step)
        self.window = Window(device)
        self.knn = None
        data = Path(args.data)
        if args.knn_every and KnnMonitor.applies_to(data):
            self.knn = KnnMonitor(data, args.image_size, self.workers, device)
        self._describe(resumed_from)

    def train_epoch(self, epoch: int) -> None:
        """The rest of epoch `epoch` from where the run stands."""
        self.epoch = epoch
        self.batches.start(epoch, self.step_in_epoch)
        self.loader.generator.manual_seed(self.seed + epoch)  # the workers' seeds
        self.set_learning_rate(epoch)
        self.model.train()
        self.window.reset()
        batches = iter(self.loader)
        while self.step_in_epoch < self.batches.steps_per_epoch:
            begun = time.perf_counter()
            im_q, im_k, unreadable = next(batches)
            waited = time.perf_counter() - begun
            self.check_images(unreadable, im_q)
            self.train_step(im_q, im_k, waited)
            self.step_in_epoch += 1
            self.step += 1
            self.report_and_save()
        self.epoch, self.step_in_epoch = epoch + 1, 0

    def train_step(self, im_q: torch.Tensor, im_k: torch.Tensor, waited: float) -> None:
        """One step of Algorithm 1 on this process's views (N, S, S, 3), uint8."""
        im_q = im_q.to(self.device, non_blocking=True)
        im_k = im_k.to(self.device, non_blocking=True)
        order = key_order(self.seed, self.step, self.args.batch_size).to(self.device)
        loss, logits, queries = moco_step(
            self.parallel, self.optimizer, self.scaler, im_q, im_k, order, self.args.amp
        )
        self.window.add(pretext_metrics(loss, logits, queries, self.args.moco_t), waited)

    def report_and_save(self) -> None:
        """What happens between two steps: the log, a checkpoint that is due, a request to stop."""
        steps, frequency = self.batches.steps_per_epoch, self.args.print_freq
        due = self.step_in_epoch % frequency == 0 or self.step_in_epoch == steps
        saving = self.args.save_steps and self.step % self.args.save_steps == 0
        if due or saving or self.step == 1:  # before any save: a NaN must not reach a checkpoint
            self.report()
        if saving:
            self.save(numbered=False)
        # Several processes must agree on the step to stop at, which costs a message: seldom.
        if (due or world_size() == 1) and self.stop.agreed(self.device):
            if self.window.steps:
                self.report()
            self.save(numbered=False)
            self.log.message(f"SIGTERM: saved {self.output / checkpoints.LAST} at step {self.step}")
            raise SystemExit(EXIT_INTERRUPTED)

    def report(self) -> None:
        """Log the window's means and begin a new one. Raises UserError when the loss is NaN."""
        args, steps = self.args, self.batches.steps_per_epoch
        values = {"epoch": self.epoch + self.step_in_epoch / steps}
        values |= self.window.means(args.batch_size) | {
            "lr": self.optimizer.param_groups[0]["lr"],
            "queue_fill": min(1.0, self.step * args.batch_size / args.moco_k),
            "chance_loss": math.log(args.moco_k + 1),
        }
        self.window.reset()
        if not math.isfinite(values["loss"]):
            last = self.output / checkpoints.LAST
            good = f"the last good checkpoint is {last}" if last.exists() else "none is saved yet"
            raise UserError(f"the loss is {values['loss']} at step {self.step}; {good}. Lower --lr")
        self.log.write(self.step, values)
        line = progress_line(self.epoch, args.epochs, self.step_in_epoch, steps, values)
        self.log.message(line)

    def monitor(self, epochs: int) -> None:
        """Log the kNN accuracy after `epochs` epochs, where the data has labels for it."""
        if self.knn is None:
            return
        if world_size() > 1:
            for buffer in self.model.encoder_q.buffers():
                dist.broadcast(buffer, 0)
        top1 = self.knn.top1(self.model.encoder_q)
        self.log.write(self.step, {"epoch": epochs, "knn_top1": top1})
        self.log.message(f"epoch {epochs}/{self.args.epochs}  kNN top-1 {top1:.2f} %")

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
            "rng": checkpoints.rng_states(),
            "config": vars(self.args) | {"seed": self.seed},
        }
        if rank() != 0:
            return
        if numbered:
            checkpoints.save_epoch(state, self.output, self.args.keep, self.args.save_every)
        else:
            checkpoints.save(state, self.output / checkpoints.LAST)

    def set_learning_rate(self, epoch: int) -> None:
        """Per epoch as in the official code: cosine over all epochs, or 0.1 at each milestone."""
        args = self.args
        if args.cos:
            factor = 0.5 * (1.0 + math.cos(math.pi * epoch / args.epochs))
        else:
            factor = 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * factor

    def check_images(self, unreadable: list[str], images: torch.Tensor | None) -> None:
        """Warn of each unreadable file once. Raises UserError beyond --max-unreadable."""
        for message in sorted(set(unreadable) - self.unreadable):
            self.unreadable.add(message)
            print(f"warning: unreadable image {len(self.unreadable)}: {message}", flush=True)
        total = len(self.loader.dataset)
        if images is None or len(self.unreadable) > self.args.max_unreadable * total:
            raise UserError(
                f"{len(self.unreadable)} of {total} images are unreadable, more than "
                f"--max-unreadable {self.args.max_unreadable} allows; the last: {unreadable[-1]}"
            )

    def _build_model(self) -> MoCo:
        args = self.args
        try:
            groups = choose_bn_groups(args.batch_size, world_size(), args.bn_groups)
        except ValueError as error:
            raise UserError(str(error)) from error
        encoder = build_encoder(args.arch, args.moco_dim, args.mlp, args.small_stem)
        model = MoCo(encoder, args.moco_dim, args.moco_k, args.moco_m, args.moco_t, groups)
        return model.to(self.device, memory_format=torch.channels_last)

    def _build_data(self):
        args = self.args
        folder = training_folder(Path(args.data))
        view = RandomView(args.image_size, args.aug_plus)
        dataset = TwoViews(folder, find_images(folder), view, self.seed)
        if len(dataset) < args.batch_size:
            raise UserError(
                f"{len(dataset)} images below {folder} are fewer than the global batch of "
                f"{args.batch_size}; pass a smaller --batch-size"
            )
        batches = GlobalBatches(len(dataset), args.batch_size, rank(), world_size(), self.seed)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        self.workers = -(-args.workers // local)
        loader = build_loader(
            dataset,
            self.workers,
            self.device.type == "cuda",
            batch_sampler=batches,
            collate_fn=collate_views,
        )
        return loader, batches

    def _resume(self, state: dict, path: Path) -> None:
        """Continue where `state` stopped; a state of the official code continues at its epoch."""
        checkpoints.load_model(self.model, state, path, self.args.arch)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = max(self.epoch, state["epoch"])
        self.step_in_epoch = state.get("step_in_epoch", 0)
        self.step = state.get("step", self.epoch * self.batches.steps_per_epoch)
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

    def _describe(self, resumed_from: Path | None) -> None:
        args, groups = self.args, self.model.bn_groups
        local = args.batch_size // world_size()
        self.log.message(
            f"{len(self.loader.dataset)} images, {self.batches.steps_per_epoch} steps an epoch; "
            f"global batch {args.batch_size} = {world_size()} process(es) x {groups} BN group(s) "
            f"x {local // groups}; {self.device}, seed {self.seed}, output {self.output}"
        )
        if resumed_from:
            self.log.message(f"resumed {resumed_from} at epoch {self.epoch}, step {self.step}")
        if args.knn_every and self.knn is None:
            self.log.message(f"no kNN monitor: {args.data} lacks class folders in train/ and val/")


def moco_step(
    model: MoCo | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    im_q: torch.Tensor,
    im_k: torch.Tensor,
    order: torch.Tensor,
    amp: str = "none",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One iteration of Algorithm 1: loss, SGD on the query encoder, keys into the queue.

    Args: see MoCo.forward; `amp` is a key of AMP_DTYPES.
    Returns:
        loss: mean over this process's queries; logits N x (1+K) and queries N x C for the log.
    """
    dtype = AMP_DTYPES[amp]
    with torch.autocast(im_q.device.type, dtype, enabled=dtype is not None):
        logits, keys, queries = model(im_q, im_k, order)
    positives = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = F.cross_entropy(logits, positives)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    getattr(model, "module", model).enqueue(keys)
    return loss, logits, queries


def parallelize(model: MoCo) -> MoCo | DistributedDataParallel:
    """Average gradients over the processes, where there are several.

    Buffers are not broadcast: the queue is equal everywhere by construction, and running
    statistics are read from rank 0 only.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def build_optimizer(model: MoCo, lr: float, momentum: float, weight_decay: float):
    """SGD with decay on all parameters; the key encoder's come along without gradients, as in the
    official code, so that optimizer states can be exchanged."""
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
