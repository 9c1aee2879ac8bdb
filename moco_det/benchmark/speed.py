"""How fast a detector is, beside the other engine that is timed in the same run.

A pretraining step's speed is in `pretrain_step.py`, that of data in `data_speed.py`.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moco_det.benchmark.cost import peak_memory_of_process
from moco_det.config.loading import load_config
from moco_det.engines import probe_class
from moco_det.parity import comparison as parity
from moco_det.parity.probe import EngineProbe


def alternate(
    candidates: dict[str, Callable],
    rounds: int,
    synchronize: Callable | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds in turn, after one untimed round.

    Turns rather than blocks, so that a machine that slows down slows down all candidates.
    """
    times = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, candidate in candidates.items():
            begun = clock()
            candidate()
            if synchronize:
                synchronize()
            if round_number:
                times[name].append(clock() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


# -- a detector, engine by engine: same weights, same images --------------------------------------


@dataclass(frozen=True)
class DetectorTask:
    """What is timed: the detector of a YAML on drawn images, the largest `height` x `width`."""

    config_file: str
    opts: tuple[str, ...]
    height: int
    width: int
    batch_size: int

    def items(self) -> list[dict]:
        """A training batch; see `moco_det.parity.probe`."""
        cfg = load_config(self.config_file, self.opts)
        return parity.build_items(cfg, self.height, self.width, self.batch_size, seed=0)

    def weights(self) -> dict[str, Tensor]:
        """Random ones with which there are proposals and detections to be handled."""
        torch.manual_seed(0)
        model = probe_class("native")(self.config_file, self.opts).model
        parity.randomize_for_parity(model, self.items(), model.state_dict().keys(), seed=0)
        return model.state_dict()


def detector_steps(
    engine: str, task: DetectorTask, weights: Mapping[str, Tensor], precisions: list[str]
) -> dict[tuple[str, str], Callable]:
    """("train" or "infer", "none" or "bf16") -> what does it once."""
    probe, items = _build_probe(engine, task, weights), task.items()
    return {
        ("train", amp): lambda amp=amp: probe.train_step(items, amp != "none") for amp in precisions
    } | {("infer", amp): lambda amp=amp: probe.infer(items[0], amp != "none") for amp in precisions}


def detector_memory(
    engine: str, task: DetectorTask, weights: Mapping[str, Tensor], amp: str
) -> int:
    """Bytes that a process of its own, or its GPU memory, takes at most for two iterations."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        state = {name: value.cpu().numpy() for name, value in weights.items()}
        return pool.apply(_detector_peak, (engine, task, state, amp))


def _detector_peak(engine: str, task: DetectorTask, state: dict, amp: str) -> int:
    weights = {name: torch.from_numpy(value) for name, value in state.items()}
    probe, items = _build_probe(engine, task, weights), task.items()
    for _ in range(2):  # the second also holds the optimizer's momentum
        probe.train_step(items, amp != "none")
    return peak_memory_of_process(next(probe.model.parameters()).device)


def _build_probe(engine: str, task: DetectorTask, weights: Mapping[str, Tensor]) -> EngineProbe:
    probe = probe_class(engine)(task.config_file, task.opts)
    probe.model.load_state_dict(weights)
    for group in probe.optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay, and with them the work
    return probe
