"""What a training run is made of, and how it is saved, resumed and prepared."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from moco_det.common import processes as comm
from moco_det.common.errors import UserError
from moco_det.config.checks import (
    check_datasets,
    check_input,
    check_metric_files,
    check_weights,
)
from moco_det.config.loading import on_available_device
from moco_det.native.engine.checkpoint import Checkpoints
from moco_det.native.engine.solver import build_lr_scheduler, build_optimizer, scaled_to_processes
from moco_det.native.modeling.rcnn import build_model
from moco_det.weights.loading import load_backbone_weights


@dataclass
class Run:
    """All that changes while training; `iteration` is the first one still to be done."""

    model: nn.Module
    optimizer: SGD
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    amp: bool
    seed: int
    accumulation: int = 1  # forward passes of one iteration
    iteration: int = 0

    def state_dict(self, iteration: int) -> dict:
        """The checkpoint after `iteration`, which counts from 0 (Detectron2's convention)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "grad_scaler": self.scaler.state_dict(),
            "iteration": iteration,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["grad_scaler"])
        self.iteration = state["iteration"] + 1

    def autocast(self):
        """SOLVER.AMP: float16 on CUDA; bfloat16, which needs no loss scaling, on a CPU."""
        device = next(self.model.parameters()).device.type
        dtype = torch.float16 if device == "cuda" else torch.bfloat16
        return torch.autocast(device, dtype, enabled=self.amp)

    def learning_rate(self) -> float:
        """That of the largest parameter group, which stands for all in the log (Detectron2)."""
        return max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]


def build_run(cfg, checkpoint: Path | None = None, allow_missing: bool = False) -> Run:
    """A run before its first iteration, or, given a checkpoint, where that was saved.

    `allow_missing`: as for `load_initial_weights`.

    Raises:
        UserError: the weights or the checkpoint cannot be read, or do not fit the model.
    """
    state = Checkpoints.load(checkpoint) if checkpoint else {}
    seed = cfg.SEED if cfg.SEED >= 0 else state.get("seed", _random_seed())
    torch.manual_seed(seed)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    amp = cfg.SOLVER.AMP.ENABLED
    run = Run(
        model=model,
        optimizer=optimizer,
        scheduler=build_lr_scheduler(cfg, optimizer),
        scaler=torch.amp.GradScaler("cuda", enabled=amp and cfg.MODEL.DEVICE.startswith("cuda")),
        amp=amp,
        seed=seed,
        accumulation=cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS,
    )
    if not checkpoint:
        load_initial_weights(cfg, model, allow_missing)
        return run
    try:
        run.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint} is from another configuration: {error}") from error
    comm.print_on_main(f"resuming from {checkpoint}: iteration {run.iteration} is next")
    return run


def _random_seed() -> int:
    return comm.from_main(int.from_bytes(os.urandom(4), "big"))


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
        comm.print_on_main("MODEL.WEIGHTS is '': the model starts from random initialisation")


def data_parallel(model: nn.Module) -> nn.Module:
    """`model`, its gradients averaged over the processes where there are several.

    Buffers follow the main process, so that all of them evaluate the model that is saved.
    """
    if comm.world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(model, [torch.cuda.current_device()] if on_gpu else None)


def prepare(cfg):
    """`cfg` as this machine and launch run it, checked; dumped to OUTPUT_DIR/config.yaml.

    Raises:
        UserError: a setting that cannot be run, a data set that does not fit it, no OUTPUT_DIR.
    """
    available = on_available_device(cfg)
    if available.MODEL.DEVICE != cfg.MODEL.DEVICE:
        comm.print_on_main(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no CUDA device: using the CPU"
        )
    cfg = scaled_to_processes(available, comm.world_size())
    if cfg.SOLVER.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}: set it to 1 or more")
    check_input(cfg, crops_objects=False)
    check_datasets(cfg)
    check_metric_files(cfg)
    if comm.is_main():
        try:
            Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
            (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
        except OSError as error:
            raise UserError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR}: {error}") from error
    comm.synchronize()
    return cfg
