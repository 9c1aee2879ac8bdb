"""What crosses the network in a step: counted in two processes, and as README.md states it."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from fork_server import run_in_two_processes
from paths import REPOSITORY
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_det.benchmark.pretrain_step import PlainMoCo
from moco_det.common import processes
from pretrain.engine.optimization import ScheduledSGD, parallelize
from pretrain.engine.pretraining import contrastive_step
from pretrain.moco.encoders import build_encoder
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.losses import InfoNCE
from pretrain.moco.momentum_contrast import MoCo

ARCH, SIZE, QUEUE, DIM = "resnet18w0.25x", 32, 64, 128
KINDS = ("images", "keys", "order", "gradients", "buffers")


def budget(batch: int, size: int, queue: int, encoder: nn.Module, official: bool) -> dict[str, int]:
    """Bytes of each kind that a process has after a step's exchanges: README.md's formulas."""
    statistics = sum(buffer.nbytes for buffer in encoder.buffers())
    return {
        "images": batch * 3 * size**2 * (4 if official else 1),
        "keys": batch * DIM * 4 * (2 if official else 1),
        "order": batch * 8 if official else 0,
        "gradients": sum(4 * parameter.numel() for parameter in encoder.parameters()),
        "buffers": queue * DIM * 4 + 2 * statistics if official else 0,
    }


class Traffic:
    """Counts the bytes of collectives while it is open, by what they carry."""

    def __init__(self):
        self.bytes = dict.fromkeys(KINDS, 0)
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Traffic":
        kind_of = {2: "keys", 4: "images"}  # by the number of dimensions

        def count(kind: Callable[..., str], tensors: Callable[..., list], function: Callable):
            def counted(*arguments, **named):
                for tensor in tensors(*arguments):
                    self.bytes[kind(tensor)] += tensor.nbytes
                return function(*arguments, **named)

            return counted

        calls = {
            (processes, "_all_gather"): (lambda t: kind_of[t.ndim], lambda out, _: [out]),
            (dist, "all_gather"): (lambda t: kind_of[t.ndim], lambda out, _: out),
            (dist, "broadcast"): (lambda _: "order", lambda tensor, _: [tensor]),
            (dist, "_broadcast_coalesced"): (
                lambda _: "buffers",
                lambda _, tensors, *rest: tensors,
            ),
        }
        for (module, name), how in calls.items():
            counted = count(*how, getattr(module, name))
            self.patches.enter_context(patch.object(module, name, counted))
        return self

    def __exit__(self, *exception) -> None:
        self.patches.close()

    def hook(self, state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Averages gradients as DistributedDataParallel does, which calls no Python for it."""
        self.bytes["gradients"] += bucket.buffer().nbytes
        reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0] / dist.get_world_size())


def our_step(batch: int) -> dict[str, int]:
    model = MoCo(build_encoder(ARCH, DIM, mlp=True), DIM, QUEUE, bn_groups=2)
    parallel, traffic = parallelize(model), Traffic()
    parallel.register_comm_hook(None, traffic.hook)
    views = [torch.randint(0, 256, (batch // 2, SIZE, SIZE, 3), dtype=torch.uint8) for _ in "qk"]
    optimizer = ScheduledSGD(model, 0.03, 0.9, 1e-4)
    with traffic:
        contrastive_step(parallel, InfoNCE(), optimizer, (*views, shuffle_index(0, 0, batch)))
    return traffic.bytes


class OfficialEncoders(nn.Module):
    """What main_moco.py wraps in DistributedDataParallel, with its defaults."""

    def __init__(self, model: PlainMoCo):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.f_q(images)


def official_step(batch: int) -> dict[str, int]:
    """The transcription's exchanges, and those of DistributedDataParallel around its model."""
    model, traffic = PlainMoCo(ARCH, DIM, QUEUE), Traffic()
    parallel = DistributedDataParallel(OfficialEncoders(model))
    parallel.register_comm_hook(None, traffic.hook)
    views = [torch.randn(batch // 2, 3, SIZE, SIZE) for _ in "qk"]
    optimizer = torch.optim.SGD(model.f_q.parameters(), 0.03)
    with traffic:
        parallel(views[0]).sum().backward()
    gradients = traffic.bytes["gradients"]  # of which the transcription averages none
    with traffic:
        model.step(optimizer, *views)
    return traffic.bytes | {"gradients": gradients}


def count(rank: int, store: str, batch: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {"ours": our_step(batch), "official": official_step(batch)}
    Path(f"{store}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_a_step_exchanges_what_the_formulas_say(tmp_path):
    batch, store = 8, tmp_path / "store"
    run_in_two_processes(count, str(store), batch)
    encoder = build_encoder(ARCH, DIM, mlp=True)
    for rank in (0, 1):
        found = json.loads(Path(f"{store}.{rank}").read_text())
        assert found["ours"] == budget(batch, SIZE, QUEUE, encoder, official=False)
        expected = budget(batch, SIZE, QUEUE, encoder, official=True)
        # The transcription is timed in one process: of two it shuffles one's images.
        assert found["official"] == expected | {"order": expected["order"] // 2}


def test_the_readme_states_what_the_formulas_give():
    text = (REPOSITORY / "pretrain" / "README.md").read_text()
    section = text.split("## What crosses the network")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    stated = [[float(cell) for cell in row[2:]] for row in rows[2:]]
    encoder = build_encoder("resnet50", DIM, mlp=True)
    columns = [
        budget(32 * gpus, 224, 65536, encoder, official)
        for gpus in (8, 64)
        for official in (False, True)
    ]
    for numbers, kind in zip(stated, KINDS, strict=False):
        assert numbers == [round(column[kind] / 1e6, 1) for column in columns], kind
    assert stated[-1] == [round(sum(column.values()) / 1e6, 1) for column in columns]
    share = float(re.search(r"would be ([\d.]+) MB a GPU", section)[1])
    assert share == round(budget(32, 224, 0, encoder, False)["images"] / 1e6, 1)
