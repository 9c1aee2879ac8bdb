"""What a person watches of a run: means of steps, progress lines, metrics.jsonl, pictures.

metrics.jsonl has one JSON object a line, under flat names; `trackers` show the same numbers in
groups, and pictures.
"""

import contextlib
import datetime
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from moco_det.common.errors import one_line
from moco_det.common.files import write_text
from moco_det.common.gpus import HostCopy
from moco_det.common.processes import is_main, on_main, world_size
from pretrain.engine.diagnosis import LOG, read_records
from pretrain.engine.trackers import PACKAGES, Tracker, grouped, open_trackers


class Report(NamedTuple):
    """What a report says beside the meter's means, as it was when these were sent."""

    step: int
    epoch: float
    place: str
    others: dict[str, float]


class MetricMeter:
    """Means of the named values over the steps since the last report, and where the time went.

    `send` takes the sums so far from the device, without waiting for it, and `means` waits for
    them: between the two there may be further steps, which count for the report after.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device = device
        self.names = names
        self.sent_at_once = device.type != "cuda"
        self.reset()

    def reset(self) -> None:
        self._begin_sums()
        self.begun = time.perf_counter()

    def _begin_sums(self) -> None:
        self.sums = torch.zeros(len(self.names), device=self.device)
        self.steps = 0
        self.waiting = 0.0

    def add(self, values: torch.Tensor, waited: float) -> None:
        self.sums += values
        self.steps += 1
        self.waiting += waited

    def leave_out(self, seconds: float) -> None:
        """They have passed since `begun`, but not in steps."""
        self.begun += seconds

    def send(self) -> None:
        """Have the sums sent to the host, and begin new ones. Collective."""
        sums = self.sums / world_size()
        if world_size() > 1:
            dist.all_reduce(sums)
        arrival = None if self.sent_at_once else HostCopy(sums)
        self.sent = sums, arrival, self.steps, self.waiting
        self._begin_sums()

    def means(self, batch_size: int) -> dict:
        """Of what was sent: averages over steps and processes, images/s of the whole run, share of
        time waiting. Waits for the device."""
        sums, arrival, steps, waiting = self.sent
        if arrival:
            sums = arrival.wait()
        now = time.perf_counter()
        seconds, self.begun = now - self.begun, now
        values = dict(zip(self.names, (v / steps for v in sums.tolist()), strict=True)) | {
            "images_per_second": steps * batch_size / seconds,
            "data_wait": waiting / seconds,
            "seconds_per_step": seconds / steps,
        }
        if self.device.type == "cuda":  # the most that this process has taken so far
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return values


class Stages:
    """How long each kind of what stands between the steps has taken: a checkpoint, a monitor."""

    def __init__(self):
        self.taken: dict[str, list[float]] = defaultdict(list)  # seconds

    def seconds(self, to_come: dict[str, int]) -> float:
        """Of so many of each kind, as long as those before on the average; 0 before the first."""
        known = {name: self.taken[name] for name in to_come if self.taken.get(name)}
        return sum(to_come[name] * sum(taken) / len(taken) for name, taken in known.items())


class RunLog:
    """Writes `metrics.jsonl` under `output`, and to trackers; the main process only. Collective.

    Args:
        step: the step that the run resumes from, 0 for a new run; what was logged beyond it is
            dropped, since the run is about to do it again.
        trackers: names of TRACKERS.
        group: of the values that belong to none of `trackers.GROUPS`.

    Attribute `kept` holds the records that were not dropped. Raises UserError where a tracker
    cannot be begun, on every process.
    """

    def __init__(
        self,
        output: Path,
        step: int,
        trackers: Sequence[str] = ("tensorboard",),
        group: str = "pretext",
    ):
        self.active, self.kept, self.step, self.group = is_main(), [], step, group
        self.trackers: dict[str, Tracker] = {}
        on_main(self._open, output, trackers)

    def _open(self, output: Path, trackers: Sequence[str]) -> None:
        path, dropped = output / LOG, []
        if self.step > 0 and path.exists():
            records = read_records(path)
            self.kept = [record for record in records if record["step"] <= self.step]
            dropped = [record for record in records if record["step"] > self.step]
        # What is done again, trackers without a purge have already.
        self.shown = {(record["step"], name) for record in dropped for name in record}
        self.shown_until = max((record["step"] for record in dropped), default=self.step)
        self.trackers = open_trackers(trackers, output, self.step)
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (lives as long as the run)

    def settings(self, flags: dict) -> None:
        """Show a new run's flags beside its numbers; bytes that are no text as escapes."""
        flags = {k: one_line(v, 1000) if isinstance(v, str) else v for k, v in flags.items()}
        for name, tracker in list(self.trackers.items()):
            if tracker.begins:
                with self._kept_going(name):
                    tracker.settings(flags)

    def write(self, step: int, values: dict) -> None:
        """One line; its numbers go to the trackers as well."""
        if not self.active or self._is_repeated(step, values):
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        for name, tracker in list(self.trackers.items()):
            wanted = {
                grouped(key, self.group): value
                for key, value in numbers.items()
                if not (tracker.appends and (step, key) in self.shown)
            }
            if wanted:
                with self._kept_going(name):
                    tracker.numbers(wanted, step)

    def picture(self, step: int, name: str, draw: Callable[[], np.ndarray | None]) -> None:
        """Show uint8 RGB pixels H x W x 3, drawn only where there is a tracker to show them; None
        is no picture."""
        wanted = {
            key: tracker
            for key, tracker in self.trackers.items()
            if not tracker.appends or step > self.shown_until or step == 0
        }
        pixels = draw() if wanted else None
        for key, tracker in wanted.items() if pixels is not None else ():
            with self._kept_going(key):
                tracker.picture(name, pixels, step)

    def close(self, failed: bool = False) -> None:
        """What is written is whole, and trackers are told how the run has ended."""
        if not self.active:
            return
        for name, tracker in list(self.trackers.items()):
            with self._kept_going(name), contextlib.suppress(OSError):  # a full disk was reported
                tracker.close(failed)
        with contextlib.suppress(OSError):
            self.file.close()

    @contextlib.contextmanager
    def _kept_going(self, name: str):
        """A service that fails in the course of a run is left, and the run goes on."""
        try:
            yield
        except Exception as error:  # what a service and its network may raise is without end
            if name not in PACKAGES:
                raise
            del self.trackers[name]
            print(f"warning: --log {name} is switched off: {one_line(error, 200)}", flush=True)

    def _is_repeated(self, step: int, values: dict) -> bool:
        """Whether a validation is logged already, of an epoch that ended without being saved."""
        return step == self.step and any(
            r["step"] == step and r.keys() == {"step", *values}
            for r in self.kept
            if "flags" not in r
        )


def progress_line(epoch: str, left: int, values: dict, beside: float = 0.0) -> str:
    """One line of at most 140 characters about a report.

    Args:
        epoch: the position in the run.
        left: steps until its end.
        beside: seconds until then that are not for steps.
        values: what was logged; "chance_loss", "loss_nn" and names that end in "_fill" are
            optional.
    """
    chance = f" (chance {values['chance_loss']:.2f})" if "chance_loss" in values else ""
    neighbours = f" nn {values['loss_nn']:.3g}" if "loss_nn" in values else ""
    fills = (name for name in values if name.endswith("_fill"))
    fill = "".join(f"{name.removesuffix('_fill')} {values[name]:.0%}  " for name in fills)
    eta = datetime.timedelta(seconds=round(left * values["seconds_per_step"] + beside))
    return (
        f"epoch {epoch}  loss {values['loss']:.4f}{chance}{neighbours}  "
        f"acc@1 {values['acc1']:.2f} acc@5 {values['acc5']:.2f}  lr {values['lr']:.4g}  {fill}"
        f"{values['images_per_second']:.0f} img/s  data {values['data_wait']:.0%}  ETA {eta}"
    )
