"""Train a detector, evaluate it: the loop, and the little that it needs beside the parts."""

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from moco_det.common import processes as comm
from moco_det.common.errors import UserError
from moco_det.config.batch_plan import plan_batch
from moco_det.config.loading import load_config
from moco_det.native.data.loader import build_train_loader, build_training_records
from moco_det.native.engine.checkpoint import Checkpoints
from moco_det.native.engine.inference import evaluate_model
from moco_det.native.engine.metric_log import MetricLog, NoLog
from moco_det.native.engine.run import Run, build_run, data_parallel, load_initial_weights, prepare
from moco_det.native.modeling.layers import precise_bn
from moco_det.native.modeling.rcnn import build_model
from moco_det.weights.loading import load_backbone_weights

__all__ = ["evaluate_weights", "load_config", "train"]

STOPPED_BY_SIGTERM = 75  # exit code: a checkpoint is saved, the same command with --resume goes on


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
        SystemExit: SIGTERM came and a checkpoint was saved; the code is `STOPPED_BY_SIGTERM`.
    """
    cfg = prepare(cfg)
    comm.print_on_main(plan_batch(cfg, comm.world_size()).describe(cfg.SOLVER.BASE_LR))
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    checkpoints = Checkpoints(cfg.OUTPUT_DIR)
    run = build_run(cfg, checkpoints.last() if resume else None, allow_missing)
    max_iter = cfg.SOLVER.MAX_ITER
    comm.print_on_main(
        f"iterations {run.iteration} to {max_iter} on {comm.world_size()} x {cfg.MODEL.DEVICE}, "
        f"seed {run.seed}"
    )
    with MetricLog(cfg.OUTPUT_DIR, run.iteration, max_iter) if comm.is_main() else NoLog() as log:
        records = build_training_records(cfg)
        batches = build_train_loader(cfg, records, run.seed, run.iteration)
        with closing(batches), Sigterm() as sigterm:
            train_loop(cfg, run, records, batches, checkpoints, log, sigterm)
        results = evaluate_model(cfg, run.model)
        log.results(max_iter, results)
    return results


def evaluate_weights(cfg, resume: bool = False, allow_missing: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS or, with `resume`, OUTPUT_DIR's last checkpoint where there is one.

    Takes, returns and raises as `train`.
    """
    cfg = prepare(cfg)
    model = build_model(cfg)
    last = Checkpoints(cfg.OUTPUT_DIR).last() if resume else None
    if last:
        load_backbone_weights(model, last, allow_missing)
    else:
        load_initial_weights(cfg, model, allow_missing)
    return evaluate_model(cfg, model)


def train_loop(cfg, run: Run, records, batches, checkpoints, log, sigterm) -> None:
    """Iterations `run.iteration` to SOLVER.MAX_ITER, with what is due between them.

    The order is Detectron2's: batch, losses, gradients, step, schedule; then precise BN,
    checkpoint, evaluation.
    """
    model = data_parallel(run.model.train())
    for iteration in range(run.iteration, cfg.SOLVER.MAX_ITER):
        start = time.perf_counter()
        losses, data_time = gradients(run, model, batches, iteration)
        metrics, stop = shared_metrics(losses, data_time, sigterm.received)
        check_finite(metrics, iteration, checkpoints)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        lr = run.learning_rate()
        run.scheduler.step()
        log.step(iteration, lr, time.perf_counter() - start, metrics)

        done, last = iteration + 1, iteration + 1 == cfg.SOLVER.MAX_ITER
        evaluating = due(done, cfg.TEST.EVAL_PERIOD) and not last
        if cfg.TEST.PRECISE_BN.ENABLED and (evaluating or last):
            fresh = build_train_loader(cfg, records, run.seed, done, num_workers=0)
            # As many images, where a forward pass has fewer.
            precise_bn(run.model, fresh, cfg.TEST.PRECISE_BN.NUM_ITER * run.accumulation)
        if due(done, cfg.SOLVER.CHECKPOINT_PERIOD) or (stop and not last):
            save(checkpoints, f"model_{iteration:07d}", run, iteration)
        if last:
            save(checkpoints, "model_final", run, iteration)
        elif stop:
            comm.print_on_main(f"SIGTERM: saved {checkpoints.last()}, to go on from with --resume")
            raise SystemExit(STOPPED_BY_SIGTERM)
        elif evaluating:
            log.results(iteration, evaluate_model(cfg, run.model))


def gradients(run: Run, model, batches, iteration: int) -> tuple[dict[str, torch.Tensor], float]:
    """Those of one iteration, averaged over its forward passes and the processes.

    Returns:
        This process's mean losses, and the seconds spent waiting for data.
    """
    run.optimizer.zero_grad()
    passes, data_time = [], 0.0
    for number in range(run.accumulation):
        start = time.perf_counter()
        batch = next(batches)
        data_time += time.perf_counter() - start
        seed_draws(run.seed, iteration * run.accumulation + number)
        with exchange_gradients(model, number + 1 == run.accumulation):
            with run.autocast():
                losses = model(batch)
                total_loss = sum(losses.values()) / run.accumulation
            run.scaler.scale(total_loss).backward()
        passes.append({name: loss.detach() for name, loss in losses.items()})
    return {k: sum(p[k] for p in passes) / run.accumulation for k in passes[0]}, data_time


def exchange_gradients(model, wanted: bool):
    """Of the passes of a step only the last need tell the other processes its sums."""
    distributed = isinstance(model, DistributedDataParallel)
    return nullcontext() if wanted or not distributed else model.no_sync()


def seed_draws(seed: int, forward_pass: int) -> None:
    """Make the model's draws a function of the run's seed, the process and the forward pass.

    So nothing that happened in between (an evaluation, an interruption) shows in them.
    """
    sequence = np.random.SeedSequence((seed, comm.rank(), forward_pass))
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def shared_metrics(
    losses: dict[str, torch.Tensor], data_time: float, stop: bool
) -> tuple[dict[str, float], bool]:
    """The same numbers on every process: mean losses, their sum, the longest wait for data.

    Also whether any process was asked to stop, so that all of them stop at the same iteration.
    """
    values = torch.stack([loss.detach() for loss in losses.values()]).tolist()
    rows = comm.gather_rows([*values, data_time, float(stop)])
    means = dict(zip(losses, rows[:, :-2].mean(dim=0).tolist(), strict=True))
    metrics = {"total_loss": sum(means.values()), **means, "data_time": rows[:, -2].max().item()}
    return metrics, bool(rows[:, -1].any())


def check_finite(metrics: dict[str, float], iteration: int, checkpoints: Checkpoints) -> None:
    if not math.isfinite(metrics["total_loss"]):
        losses = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "_" in name)
        good = checkpoints.last()
        raise UserError(
            f"the loss is not finite at iteration {iteration} ({losses}); last good checkpoint: "
            f"{good or 'none was saved yet'}. Lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS"
        )


def due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0


def save(checkpoints: Checkpoints, name: str, run: Run, iteration: int) -> None:
    if comm.is_main():
        checkpoints.save(name, run.state_dict(iteration))
    comm.synchronize()


class Sigterm:
    """While open, SIGTERM sets `received` instead of ending the process."""

    received = False

    def __enter__(self) -> "Sigterm":
        # Python lets only the main thread handle signals; elsewhere SIGTERM keeps its meaning.
        self._restore: Callable | int | None = None
        if threading.current_thread() is threading.main_thread():
            self._restore = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, signum, frame) -> None:
        self.received = True

    def __exit__(self, *exception) -> None:
        if self._restore is not None:
            signal.signal(signal.SIGTERM, self._restore)
