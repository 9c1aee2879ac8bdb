"""Memory and time of a mechanism's training step: Table 3 of MoCo v2 (arXiv:2003.04297)."""

import errno
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.multiprocessing import ProcessExitedException

from moco_det.common.errors import UserError, is_out_of_memory
from moco_det.common.launch import free_local_url, spawn
from moco_det.common.processes import gather_rows, is_main, rank, world_size
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD, parallelize
from pretrain.engine.pretraining import contrastive_step
from pretrain.moco import MECHANISMS, build_mechanism
from pretrain.moco.encoders import build_encoder
from pretrain.moco.grouped_batchnorm import choose_bn_groups
from pretrain.moco.losses import InfoNCE

IMAGENET = 1_281_167  # training images
EPOCHS = 200


@dataclass(frozen=True)
class Cost:
    """What a step takes: `memory` in bytes on each device, the largest; `seconds`, the median."""

    memory: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What is measured: MoCo v2's model (MLP head, tau 0.2, K 65536) on images of noise.

    `batch_size` is global; each of `processes` has a GPU of its own, or shares the CPU.
    """

    mechanism: str
    batch_size: int
    arch: str = "resnet50"
    image_size: int = 224
    device: str = "cpu"
    processes: int = 1
    amp: str = "none"


COLUMNS = ("mechanism", "batch", "memory", "s/step", "hours / 200 ep.")
# Table 3: ResNet-50, 224 pixels, 8 V100 of 16 GB. Mechanism and batch -> GB on each GPU, hours.
# 93.0 is the authors' estimate: it did not fit.
TABLE_3 = {
    ("moco", 256): (5.0, 53.0),
    ("end-to-end", 256): (7.4, 65.0),
    ("end-to-end", 4096): (93.0, None),
}


def measure(setting: Setting, steps: int) -> Cost | None:
    """Run two steps and `steps` timed ones in new processes; None where memory does not suffice.

    The memory is PyTorch's peak on the GPU; on a CPU the peak of the whole process, the libraries
    included.

    Raises:
        UserError: there are not as many GPUs, or the batch cannot be shared by the processes.
    """
    if setting.device == "cuda" and torch.cuda.device_count() < setting.processes:
        raise UserError(
            f"--device cuda --processes {setting.processes} needs as many GPUs; there are "
            f"{torch.cuda.device_count()}: pass --processes, or --device cpu"
        )
    choose_bn_groups(setting.batch_size, setting.processes)
    backend = "nccl" if setting.device == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "cost"
        arguments, size = (setting, steps, result), setting.processes
        try:
            spawn(_run, arguments, size, 0, size, free_local_url(), backend)
        except SystemExit as end:
            if end.code != errno.ENOMEM:
                raise
            return None
        except ProcessExitedException as error:
            # By the kernel, which does so when a CPU's memory is used up.
            if error.signal_name != "SIGKILL":
                raise
            return None
        memory, seconds = torch.load(result)
    return Cost(int(memory), seconds)


def _run(setting: Setting, steps: int, result: Path) -> None:
    device = torch.device(setting.device)
    try:
        seconds = _time_steps(setting, steps, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        os._exit(errno.ENOMEM)  # at once: to leave the process group may wait for the others
    costs = gather_rows([peak_memory_of_process(device), seconds])
    if is_main():
        torch.save(costs.amax(dim=0).tolist(), result)


def _time_steps(setting: Setting, steps: int, device: torch.device) -> float:
    """Median seconds of a step but the first two, which set up momentum and libraries."""
    views = [_noise(setting, device) for _ in range(MECHANISMS[setting.mechanism].num_views)]
    model = build_mechanism(
        setting.mechanism,
        build_encoder(setting.arch, mlp=True),
        samples=IMAGENET,
        temperature=0.2,
        bn_groups=choose_bn_groups(setting.batch_size, world_size()),
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    parallel, loss = parallelize(model), InfoNCE()
    # A learning rate that keeps the weights finite on noise.
    optimizer = ScheduledSGD(model, 1e-4, 0.9, 1e-4, scale_gradients=setting.amp == "fp16")
    times = []
    for step in range(steps + 2):
        indices = torch.arange(setting.batch_size)
        begun = time.perf_counter()
        inputs = model.inputs(views, indices, seed=0, step=step)
        contrastive_step(parallel, loss, optimizer, inputs, AMP_DTYPES[setting.amp])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return median(times[2:])


def _noise(setting: Setting, device: torch.device) -> torch.Tensor:
    shape = (setting.batch_size // world_size(), setting.image_size, setting.image_size, 3)
    generator = torch.Generator(device).manual_seed(rank())
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)


def peak_memory_of_process(device: torch.device) -> int:
    """Bytes that this process has taken at most: of `device`'s memory if it is a GPU, else in all.

    On a CPU the libraries count as well.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss counts the parent process as well
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def hours(cost: Cost, batch_size: int) -> float:
    """Of 200 epochs of ImageNet; an epoch's last, incomplete batch is dropped."""
    return EPOCHS * (IMAGENET // batch_size) * cost.seconds / 3600


def table_rows(costs: dict[tuple[str, int], Cost | None]) -> list[list[str]]:
    """Cells under COLUMNS, a row for each (mechanism, batch size), then the paper's rows."""
    rows = []
    for (mechanism, batch_size), cost in costs.items():
        cells = ["n/a"] * 3
        if cost:
            time_taken = hours(cost, batch_size)
            cells = [f"{cost.memory / 2**30:.2f} GiB", f"{cost.seconds:.3f}", f"{time_taken:.1f}"]
        rows.append([mechanism, str(batch_size), *cells])
    for (mechanism, batch_size), (memory, time_taken) in TABLE_3.items():
        time_taken = "n/a" if time_taken is None else f"{time_taken:g}"
        rows.append([f"paper: {mechanism}", str(batch_size), f"{memory} G", "", time_taken])
    return rows


def ratios(costs: dict[tuple[str, int], Cost | None]) -> list[str]:
    """End-to-end's memory and time over MoCo's at equal batches, and the paper's at 256."""
    paper = [e / m for e, m in zip(TABLE_3["end-to-end", 256], TABLE_3["moco", 256], strict=True)]
    lines = []
    for batch_size in dict.fromkeys(batch for _, batch in costs):
        pair = [costs.get((name, batch_size)) for name in ("end-to-end", "moco")]
        if all(pair):
            lines.append(
                f"end-to-end over moco at batch {batch_size}: memory "
                f"{pair[0].memory / pair[1].memory:.2f}, time "
                f"{pair[0].seconds / pair[1].seconds:.2f} "
                f"(paper, batch 256: {paper[0]:.2f}, {paper[1]:.2f})"
            )
    return lines
