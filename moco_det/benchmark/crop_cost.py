"""What multi-crop costs, beside what the number of its pixels lets one expect.

A convolutional network's time goes with the pixels. Of queries there are a forward and a backward
pass, which takes twice as long; of keys, the large crops of one view, a forward pass alone.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from moco_det.benchmark.speed import alternate
from moco_det.common.errors import UserError
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD
from pretrain.engine.pretraining import MoCoPretraining
from pretrain.moco import build_mechanism
from pretrain.moco.encoders import build_encoder
from pretrain.moco.grouped_batchnorm import choose_bn_groups
from pretrain.moco.losses import InfoNCE

FORWARD, BACKWARD = 1, 2  # times that of a forward pass


@dataclass(frozen=True)
class Crops:
    """The views of an image in a step: a query and a key of `large` pixels a side, and `count`
    small queries of `small`; `neighbours`: k of kNN-MoCo, 0 for MoCo."""

    large: int
    small: int = 0
    count: int = 0
    neighbours: int = 0

    def __str__(self) -> str:
        small = f" + {self.count} x {self.small}" if self.count else ""
        return f"2 x {self.large}{small}" + ", neighbours" * bool(self.neighbours)

    @property
    def work(self) -> int:
        """In forward passes of a pixel."""
        queries = self.large**2 + self.count * self.small**2
        return (FORWARD + BACKWARD) * queries + FORWARD * self.large**2


# The first is what the others are predicted from; the second and third are the paper's.
PAPER = (Crops(224), Crops(160, 96, 4), Crops(160, 96, 4, neighbours=20))


def time_crops(
    forms: Sequence[Crops],
    arch: str,
    batch_size: int,
    device: str,
    amp: str = "none",
    rounds: int = 5,
    queue: int = 65536,
) -> dict[Crops, float]:
    """Seconds of a step of each form, in turn with the others'; on a CPU the processor time of one
    thread, which other programs do not stretch."""
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available here; pass --device cpu")
    steps = {form: _step(form, arch, batch_size, device, amp, queue) for form in forms}
    if gpu:
        return alternate(steps, rounds, torch.cuda.synchronize)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other, which takes processor time
    try:
        return alternate(steps, rounds, clock=time.process_time)
    finally:
        torch.set_num_threads(threads)


def _step(
    form: Crops, arch: str, batch_size: int, device: str, amp: str, queue: int
) -> Callable[[], torch.Tensor]:
    """A step of MoCo v2 on noise."""
    torch.manual_seed(0)
    model = build_mechanism(
        "moco",
        build_encoder(arch, mlp=True),
        negatives=queue,
        samples=batch_size,
        temperature=0.2,
        bn_groups=choose_bn_groups(batch_size, 1),
        neighbours=form.neighbours,
    ).to(device, memory_format=torch.channels_last)
    # A learning rate that keeps the weights finite on noise.
    optimizer = ScheduledSGD(model, 1e-4, 0.9, 1e-4, scale_gradients=amp == "fp16")
    options = {"dtype": AMP_DTYPES[amp], "auxiliary_weight": 0.4}
    task = MoCoPretraining(model, InfoNCE(), optimizer, None, seed=0, **options)
    sides = [form.large] * 2 + [form.small] * form.count
    views = [
        torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8, device=device)
        for side in sides
    ]
    batch = SimpleNamespace(views=views, indices=torch.arange(batch_size))
    numbers = itertools.count()
    return lambda: task.step(batch, next(numbers))


COLUMNS = ("crops", "ms", "predicted from the pixels, ms", "ratio")


def table_rows(seconds: dict[Crops, float]) -> list[list[str]]:
    """Cells under COLUMNS; the first form predicts the others."""
    first = next(iter(seconds))
    rows = []
    for form, taken in seconds.items():
        predicted = seconds[first] * form.work / first.work
        rows.append(
            [str(form), f"{1e3 * taken:.0f}", f"{1e3 * predicted:.0f}", f"{taken / predicted:.3f}"]
        )
    return rows
