"""How fast a detector is, beside the other engine that is timed in the same run.

A pretraining step's speed is in `pretrain_step.py`, that of data in `data_speed.py`.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moco_det.benchmark.cost import peak_memory_of_process
from moco_det.benchmark.waits import count_waits
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

    @property
    def device(self) -> str:
        return load_config(self.config_file, self.opts).MODEL.DEVICE

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
    engine: str,
    task: DetectorTask,
    weights: Mapping[str, Tensor],
    precisions: list[str],
    compiled: bool = False,
) -> dict[tuple[str, str], Callable]:
    """("train" or "infer", "none" or "bf16") -> what does it once, on a whole batch.

    `compiled`: the backbone and its pyramid, by `torch.compile`, for images of any size.
    """
    probe, items = _build_probe(engine, task, weights), task.items()
    if compiled:
        probe.model.backbone.compile(dynamic=True)
    steps = {"train": probe.train_step, "infer": probe.infer}
    return {
        (phase, amp): partial(step, items, amp != "none")
        for phase, step in steps.items()
        for amp in precisions
    }


@dataclass(frozen=True)
class DetectorTimes:
    """One row of `detector-step`: what an engine needs for a batch, beside another."""

    batch_size: int
    phase: str  # "train" or "infer"
    amp: str
    seconds: tuple[float, float]  # of the other and of ours, for the batch
    memory: tuple[int, int] | None  # bytes at most; of training
    waits: tuple[int | None, int | None]  # for the device, of the host; None where unknown

    def cells(self) -> list[str]:
        theirs, ours = (f"{1000 * s:.1f}" for s in self.seconds)
        row = [str(self.batch_size), self.phase, {"none": "fp32"}.get(self.amp, self.amp)]
        row += [theirs, ours, f"{self.seconds[1] / self.seconds[0]:.2f}"]
        if self.memory:
            row += [f"{m / 2**30:.2f}" for m in self.memory]
            row.append(f"{self.memory[1] / self.memory[0]:.2f}")
        else:
            row += [""] * 3
        return row + ["" if count is None else str(count) for count in self.waits]


def compare_detectors(
    engines: tuple[str, str],
    task: DetectorTask,
    precisions: list[str],
    rounds: int,
    compiled: bool = False,
) -> list[DetectorTimes]:
    """Two engines, the other's and ours, in turn: a row for each phase and precision.

    Args:
        compiled: our backbone, see `detector_steps`.
    """
    weights = task.weights()
    both = {
        (number, *step): function
        for number, engine in enumerate(engines)
        for step, function in detector_steps(
            engine, task, weights, precisions, compiled and number == 1
        ).items()
    }
    on_gpu = task.device.startswith("cuda")
    # Of another engine on a CPU its CPU's code would be counted.
    counted = [engine == "native" or on_gpu for engine in engines]
    seconds = alternate(both, rounds, torch.cuda.synchronize if on_gpu else None)
    waits = {
        key: count_waits(step).total() if counted[key[0]] and not compiled else None
        for key, step in both.items()
    }
    del both
    memory = {
        amp: tuple(detector_memory(engine, task, weights, amp) for engine in engines)
        for amp in precisions
    }
    return [
        DetectorTimes(
            task.batch_size,
            phase,
            amp,
            tuple(seconds[number, phase, amp] for number in (0, 1)),
            memory[amp] if phase == "train" else None,
            tuple(waits[number, phase, amp] for number in (0, 1)),
        )
        for phase in ("train", "infer")
        for amp in precisions
    ]


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
