"""Train a detector and evaluate it: what a config asks for, from data sets to metrics.

    train: prepare -> build_state -> build_trainer -> Trainer.run -> evaluate_model

The functions stand in the order in which they are called.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moco_det.common.errors import UserError
from moco_det.common.files import make_folder, write_text
from moco_det.common.gpus import HostCopy
from moco_det.common.processes import (
    StopRequest,
    end_run,
    from_main,
    gather_rows,
    is_main,
    print_on_main,
    rank,
    synchronize,
    world_size,
)
from moco_det.common.resume_state import check_optimizer, checked_schedule, entries_of
from moco_det.common.weight_checks import shorten
from moco_det.common.weight_sources import read_state_dict
from moco_det.config.checks import (
    BatchPlan,
    check_datasets,
    check_input,
    check_metric_files,
    check_scoring,
    check_solver,
    check_weights,
    plan_batch,
    scaled_to_processes,
)
from moco_det.config.loading import load_config, on_available_device
from moco_det.datasets import read_categories_together
from moco_det.datasets.sharing import once_per_machine
from moco_det.native.data.loader import build_train_loader, shared_training_records
from moco_det.native.engine.inference import evaluate_model
from moco_det.native.engine.output_dir import Checkpoints, MetricLog
from moco_det.native.engine.solver import (
    build_lr_scheduler,
    build_optimizer,
    lay_out_momentum,
)
from moco_det.native.modeling.layers import (
    accumulate_gradients,
    half_precision,
    on_gpu,
    precise_bn,
)
from moco_det.native.modeling.meta_arch import build_model
from moco_det.weights.files import load_backbone_weights

__all__ = ["evaluate_weights", "load_config", "train"]


def train(cfg, resume: bool = False, allow_missing: bool = False) -> dict:
    """Train the detector that `cfg` describes and evaluate it; every process of a run calls it.

    Args:
        cfg: a config of `moco_det.config.loading`.
        resume: go on from OUTPUT_DIR's last checkpoint, where there is one.
        allow_missing: let backbone arrays that MODEL.WEIGHTS lacks keep their initial values.

    Returns:
        The final results on the main process (see `evaluate_model`), {} on the others.

    Raises:
        UserError: bad settings, data or weights; a loss that is not finite; a full disk.
        SystemExit: SIGTERM or Ctrl-C came and a checkpoint was saved; the code is that of
            `processes.STOPS`.
    """
    cfg = prepare(cfg)
    plan = plan_batch(cfg, world_size())
    print_on_main(plan.describe(cfg.SOLVER.BASE_LR))
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    checkpoints = Checkpoints(cfg.OUTPUT_DIR)
    checkpoint = checkpoints.newest_whole(Checkpoints.load) if resume else None
    state = build_state(cfg, checkpoint, allow_missing)
    first, max_iter = state.iteration, cfg.SOLVER.MAX_ITER
    print_on_main(
        f"iterations {first} to {max_iter} on {world_size()} x {cfg.MODEL.DEVICE}, "
        f"seed {state.seed}"
    )
    with MetricLog(cfg.OUTPUT_DIR, first, max_iter) if is_main() else nullcontext() as log:
        trainer = build_trainer(cfg, plan, state, checkpoints, log)
        trainer.run()
        return trainer.evaluated(max_iter)


def evaluate_weights(cfg, resume: bool = False, allow_missing: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS or, with `resume`, OUTPUT_DIR's last checkpoint where there is one.

    Takes, returns and raises as `train`.
    """
    cfg = prepare(cfg)
    model = build_model(cfg)
    last = Checkpoints(cfg.OUTPUT_DIR).newest_whole(read_state_dict) if resume else None
    if last:
        load_backbone_weights(model, last[0], allow_missing)
    else:
        load_initial_weights(cfg, model, allow_missing)
    return evaluate_model(cfg, model)


# -- before the first iteration -------------------------------------------------------------------


def prepare(cfg):
    """`cfg` as this machine and launch run it, checked; dumped to OUTPUT_DIR/config.yaml.

    Raises:
        UserError: a setting that cannot be run, a data set that does not fit it, no OUTPUT_DIR.
    """
    available = on_available_device(cfg)
    if available.MODEL.DEVICE != cfg.MODEL.DEVICE:
        print_on_main(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no CUDA device: using the CPU"
        )
    cfg = scaled_to_processes(available, world_size())
    if cfg.SOLVER.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}: set it to 1 or more")
    check_input(cfg, crops_objects=False)
    check_solver(cfg)
    read_categories_together((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    check_datasets(cfg)
    check_metric_files(cfg)
    once_per_machine(check_scoring, cfg, cfg.DATASETS.TEST)
    if is_main():
        make_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        try:
            write_text(Path(cfg.OUTPUT_DIR) / "config.yaml", cfg.dump())
        except OSError as error:
            raise UserError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR}: {error}") from error
    synchronize()
    return cfg


@dataclass
class TrainingState:
    """All that changes while training, and is saved; `iteration` is the first still to be done."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    seed: int
    iteration: int = 0

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "grad_scaler": self.scaler,
        }

    def state_dict(self, iteration: int) -> dict:
        """The checkpoint after `iteration`, which counts from 0 (Detectron2's convention)."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "iteration": iteration, "seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        """Raises StateFault, or what torch raises, where a part does not fit."""
        self.model.load_state_dict(state["model"])
        done, scaled = state["iteration"] + 1, bool(state.get("grad_scaler"))
        # float16 leaves out steps, with which the first momentum may be still to come.
        check_optimizer(state["optimizer"], self.optimizer, stepped=not scaled)
        schedule = checked_schedule(state["scheduler"], self.scheduler, done)
        # Which kernels the optimizer uses is this machine's affair.
        kernels = [{k: group[k] for k in ("foreach", "fused")} for group in self._groups()]
        for name, part in self._parts().items():
            if part is self.scaler and not state[name]:
                continue  # saved where none was needed
            part.load_state_dict(schedule if part is self.scheduler else state[name])
        for group, own in zip(self._groups(), kernels, strict=True):
            group.update(own)
        lay_out_momentum(self.optimizer)
        self.iteration = done

    def _groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def step(self) -> float:
        """Update the parameters by their gradients, and the schedule.

        Returns:
            The learning rate of the update: that of the largest parameter group, which stands for
            all in the log (Detectron2).
        """
        self.scaler.unscale_(self.optimizer)  # before they are clipped, which is part of the step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        largest = max(self._groups(), key=lambda group: len(group["params"]))
        lr = largest["lr"]
        self.scheduler.step()
        return lr


def build_state(
    cfg, checkpoint: tuple[Path, dict] | None = None, allow_missing: bool = False
) -> TrainingState:
    """A run before its first iteration or, given a checkpoint and its content, where it was saved.

    `allow_missing`: as for `load_initial_weights`.

    Raises:
        UserError: the weights or the checkpoint cannot be read, or do not fit the model.
    """
    path, saved = checkpoint or (None, {})
    seed = cfg.SEED
    if seed < 0:
        seed = saved.get("seed", from_main(int.from_bytes(os.urandom(4), "big")))
    torch.manual_seed(seed)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scaling = precision_of(cfg, model) is torch.float16
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=build_lr_scheduler(cfg, optimizer),
        scaler=torch.amp.GradScaler("cuda", enabled=scaling),
        seed=seed,
    )
    if not checkpoint:
        load_initial_weights(cfg, model, allow_missing)
        return state
    try:
        with entries_of(path):
            state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        why = shorten(str(error).split("\n\t")[1:] or [str(error)])
        raise UserError(f"{path} is from another configuration: {why}") from error
    print_on_main(f"resuming from {path}: iteration {state.iteration} is next")
    return state


def precision_of(cfg, model: nn.Module) -> torch.dtype | None:
    """Of the forward passes that SOLVER.AMP asks for; None: float32."""
    device = next(model.parameters()).device
    return half_precision(device) if cfg.SOLVER.AMP.ENABLED else None


def load_initial_weights(cfg, model: nn.Module, allow_missing: bool = False) -> None:
    """Fill `model` from MODEL.WEIGHTS; where that is "", leave it at its random initialisation.

    `allow_missing`: let arrays of the backbone that the file lacks keep their initial values.

    Raises:
        UserError: the file cannot be had or read, lacks a part of the backbone, or was made for
            another configuration.
    """
    if cfg.MODEL.WEIGHTS:
        report = load_backbone_weights(model, cfg.MODEL.WEIGHTS, allow_missing)
        check_weights(cfg, report.metadata)
    else:
        print_on_main("MODEL.WEIGHTS is '': the model starts from random initialisation")


# -- the loop -------------------------------------------------------------------------------------


def build_trainer(
    cfg, plan: BatchPlan, state: TrainingState, checkpoints: Checkpoints, log: MetricLog | None
) -> "Trainer":
    """UserError where there is nothing to train on."""
    bn, records = cfg.TEST.PRECISE_BN, shared_training_records(cfg)
    return Trainer(
        state=state,
        batches_from=partial(build_train_loader, cfg, plan, records, state.seed),
        evaluate=partial(evaluate_model, cfg),
        accumulation=plan.accumulation,
        precision=precision_of(cfg, state.model),
        max_iter=cfg.SOLVER.MAX_ITER,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        eval_period=cfg.TEST.EVAL_PERIOD,
        # As many images, where a forward pass has fewer.
        precise_bn_passes=bn.NUM_ITER * plan.accumulation if bn.ENABLED else 0,
        checkpoints=checkpoints,
        log=log,
    )


class Iteration(NamedTuple):
    """One that is done, but for its losses, which may be on their way to the host."""

    number: int
    losses: HostCopy
    data_time: float
    lr: float
    seconds: float


@dataclass
class Trainer:
    """Iterations `state.iteration` to `max_iter`, with what is due between them.

    Args:
        state: what is trained.
        batches_from: (iteration, num_workers=...) -> this process's batches of one forward pass
            each, from that iteration on, without end; to be closed.
        evaluate: model, and what is to show its predictions or None -> results.
        accumulation: forward passes of one iteration, whose gradients are averaged.
        precision: of the forward passes, see `accumulate_gradients`.
        max_iter: iterations in all.
        checkpoint_period, eval_period: iterations between two; 0 for none but the last.
        precise_bn_passes: forward passes of precise BN before each evaluation; 0 for no precise BN.
        checkpoints, log: where the state and the numbers go; None on all but the main process.
    """

    state: TrainingState
    batches_from: Callable[..., Iterator[list[dict]]]
    evaluate: Callable[[nn.Module, Callable | None], dict]
    accumulation: int
    precision: torch.dtype | None
    max_iter: int
    checkpoint_period: int
    eval_period: int
    precise_bn_passes: int
    checkpoints: Checkpoints
    log: MetricLog | None

    def run(self) -> None:
        """The order is Detectron2's: batch, losses, gradients, step, schedule; then what is due.

        A loss that is not finite ends the run before the next checkpoint or evaluation.

        Raises:
            UserError, SystemExit: see `train`.
        """
        if self.state.iteration == self.max_iter:
            self.save_missing_final()
        model = data_parallel(self.state.model.train())
        with closing(self.batches_from(self.state.iteration)) as batches, StopRequest() as request:
            unread: list[Iteration] = []
            late = on_gpu(next(self.state.model.parameters()))
            for iteration in range(self.state.iteration, self.max_iter):
                start = time.perf_counter()
                losses, data_time = self.compute_gradients(model, batches, iteration)
                lr, seconds = self.state.step(), time.perf_counter() - start
                unread.append(Iteration(iteration, HostCopy(losses), data_time, lr, seconds))
                # A GPU is still busy with these: the losses read are those of the iteration before,
                # but where the state is about to be used.
                ahead = late and not self.something_is_due(iteration + 1)
                stop = self.read(unread, int(ahead), request)
                if stop:
                    self.read(unread, 0, request)
                self.after_iteration(iteration, stop)

    def something_is_due(self, done: int) -> bool:
        periods = self.checkpoint_period, self.eval_period
        return done == self.max_iter or any(due(done, period) for period in periods)

    def read(self, unread: list["Iteration"], but: int, request: StopRequest) -> int:
        """Check and log the losses of all `unread` iterations `but` so many, which are kept.

        Returns the signal that asks for a stop, of any process.
        """
        stop = 0
        while len(unread) > but:
            done = unread.pop(0)
            losses = done.losses.wait()
            metrics, asked = shared_metrics(losses, done.data_time, request.received)
            stop = max(stop, asked)
            first = done.number == self.state.iteration
            check_finite(metrics, done.number, self.checkpoints, first)
            if self.log:
                self.log.step(done.number, done.lr, done.seconds, metrics)
        return stop

    def compute_gradients(
        self, model: nn.Module, batches: Iterator[list[dict]], iteration: int
    ) -> tuple[dict[str, Tensor], float]:
        """Those of one iteration, and what `accumulate_gradients` returns."""
        state, seed = self.state, partial(self.seed_draws, iteration)
        state.optimizer.zero_grad()
        return accumulate_gradients(
            model, batches, state.scaler, self.accumulation, self.precision, before_pass=seed
        )

    def seed_draws(self, iteration: int, number: int) -> None:
        """Make the model's draws a function of the run's seed, the process and the forward pass.

        So nothing that happened in between (an evaluation, an interruption) shows in them.
        """
        seeds = (self.state.seed, rank(), iteration * self.accumulation + number)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    def after_iteration(self, iteration: int, stop: int) -> None:
        """Precise BN, checkpoint, evaluation, as they are due; the end, where it is asked for.

        The evaluation after the last iteration is `train`'s. `stop`: the signal that asks for it.
        """
        done = iteration + 1
        last = done == self.max_iter
        evaluating = due(done, self.eval_period) and not last
        if self.precise_bn_passes and (evaluating or last):
            fresh = self.batches_from(done, num_workers=0)
            with self.timed("precise BN", self.eval_period):
                precise_bn(self.state.model, fresh, self.precise_bn_passes)
        if due(done, self.checkpoint_period) or (stop and not last):
            self.save(f"model_{iteration:07d}", iteration)
        if last:
            self.save("model_final", iteration)
        elif stop:
            end_run(stop, f"{self.checkpoints.last()}, to go on from with --resume")
        elif evaluating:
            self.evaluated(iteration)

    def evaluated(self, iteration: int) -> dict:
        """The results of an evaluation, logged with some of the predictions as of `iteration`."""
        show = partial(self.log.predictions, iteration) if self.log else None
        with self.timed("evaluation", self.eval_period):
            results = self.evaluate(self.state.model, show)
        if self.log:
            self.log.results(iteration, results)
        return results

    def timed(self, stage: str, period: int) -> AbstractContextManager:
        """What is done while this is open counts in the time that is left, once in `period`."""
        return self.log.timed(stage, period) if self.log else nullcontext()

    def save(self, name: str, iteration: int) -> None:
        with self.timed("checkpoint", self.checkpoint_period):
            if is_main():
                self.checkpoints.save(name, self.state.state_dict(iteration))
            synchronize()

    def save_missing_final(self) -> None:
        """After a kill between the last iteration's two checkpoints, which hold the same."""
        final = self.checkpoints.folder / "model_final.pth"
        if is_main() and self.checkpoints.last() != final:
            self.checkpoints.save(final.stem, self.state.state_dict(self.max_iter - 1))
        synchronize()


def data_parallel(model: nn.Module) -> nn.Module:
    """`model`, its gradients averaged over the processes where there are several.

    Buffers follow the main process, so that all of them evaluate the model that is saved.
    """
    if world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(model, [torch.cuda.current_device()] if on_gpu else None)


def shared_metrics(
    losses: dict[str, Tensor], data_time: float, stop: int
) -> tuple[dict[str, float], int]:
    """The same numbers on every process: mean losses, their sum, the longest wait for data.

    Also the signal by which any process was asked to stop, 0 for none, so that all of them stop at
    the same iteration.
    """
    values = [loss.item() for loss in losses.values()]
    rows = gather_rows([*values, data_time, float(stop)])
    means = dict(zip(losses, rows[:, :-2].mean(dim=0).tolist(), strict=True))
    metrics = {"total_loss": sum(means.values()), **means, "data_time": rows[:, -2].max().item()}
    return metrics, int(rows[:, -1].max())


def check_finite(
    metrics: dict[str, float], iteration: int, checkpoints: Checkpoints, first: bool
) -> None:
    """Raises UserError. Before the `first` step of a process no learning rate can be to blame."""
    if not math.isfinite(metrics["total_loss"]):
        losses = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "_" in name)
        good = checkpoints.last()
        remedy = "Lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS"
        if first:
            remedy = "No step was taken yet: the weights or the data are not what they should be"
        raise UserError(
            f"the loss is not finite at iteration {iteration} ({losses}); last good checkpoint: "
            f"{good or 'none was saved yet'}. {remedy}"
        )


def due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0
