"""What a person watches: a progress line, TensorBoard, and one JSON object a line."""

import datetime
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from moco_det.common.processes import is_main, world_size


class MetricMeter:
    """Means of the named values over the steps since the last report, and where the time went."""

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device = device
        self.names = names
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(self.names), device=self.device)
        self.steps = 0
        self.waiting = 0.0
        self.begun = time.perf_counter()

    def add(self, values: torch.Tensor, waited: float) -> None:
        self.sums += values
        self.steps += 1
        self.waiting += waited

    def means(self, batch_size: int) -> dict:
        """Averages over steps and processes, images/s of the whole run, share of time waiting."""
        sums = self.sums / world_size()
        if world_size() > 1:
            dist.all_reduce(sums)
        values = [v / self.steps for v in sums.tolist()]  # waits for the device
        seconds = time.perf_counter() - self.begun
        return dict(zip(self.names, values, strict=True)) | {
            "images_per_second": self.steps * batch_size / seconds,
            "data_wait": self.waiting / seconds,
            "seconds_per_step": seconds / self.steps,
        }


class RunLog:
    """Writes `metrics.jsonl` and TensorBoard events under `output`; the main process only.

    Args:
        step: the step that the run resumes from, 0 for a new run; what was logged beyond it is
            dropped, since the run is about to do it again.

    Attribute `kept` holds the lines that were not dropped, parsed.
    """

    def __init__(self, output: Path, step: int):
        self.active, self.kept = is_main(), []
        if not self.active:
            return
        path = output / "metrics.jsonl"
        kept = []
        if step > 0 and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        self.file = open(path, "w", buffering=1)  # noqa: SIM115 (lives as long as the run)
        self.file.writelines(line + "\n" for line in kept)
        self.kept = [json.loads(line) for line in kept]
        self.board = SummaryWriter(str(output), purge_step=step + 1)

    def write(self, step: int, values: dict) -> None:
        """One line; its numbers go to TensorBoard as well."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; a line cut short by a kill belongs to no kept step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def progress_line(epoch: str, left: int, values: dict) -> str:
    """One line of at most 140 characters about a report.

    Args:
        epoch: the position in the run.
        left: steps until its end.
        values: what was logged; "chance_loss" and names that end in "_fill" are optional.
    """
    chance = f" (chance {values['chance_loss']:.2f})" if "chance_loss" in values else ""
    fills = (name for name in values if name.endswith("_fill"))
    fill = "".join(f"{name.removesuffix('_fill')} {values[name]:.0%}  " for name in fills)
    eta = datetime.timedelta(seconds=round(left * values["seconds_per_step"]))
    return (
        f"epoch {epoch}  loss {values['loss']:.4f}{chance}  "
        f"acc@1 {values['acc1']:.2f} acc@5 {values['acc5']:.2f}  lr {values['lr']:.4g}  {fill}"
        f"{values['images_per_second']:.0f} img/s  data {values['data_wait']:.0%}  ETA {eta}"
    )
