"""How fast a pretraining step is, beside what a user of the official code would write.

The reference is facebookresearch/moco's step written down plainly, as it is published and with the
lines that users add to it; ours is the step that `pretrain/main.py` takes. All of them are timed in
turn, in one process.
"""

import itertools
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moco_det.benchmark.cost import peak_memory_of_process
from moco_det.benchmark.speed import alternate
from moco_det.common.errors import UserError
from moco_det.common.launch import free_local_url, process_group
from pretrain.engine.device import use_deterministic_kernels
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD
from pretrain.engine.pretraining import MoCoPretraining
from pretrain.moco.encoders import build_encoder
from pretrain.moco.grouped_batchnorm import choose_bn_groups
from pretrain.moco.instance_discrimination import PIXEL_MEAN, PIXEL_STD
from pretrain.moco.losses import InfoNCE
from pretrain.moco.momentum_contrast import MoCo

COMPILED = ("off", "on", "graphs")  # of encoders; the last with CUDA graphs
NAMES = {"none": "fp32", "bf16": "bf16", "fp16": "fp16"}
# A GPU is given several steps before it is waited for, as in training.
STEPS = {"cpu": 1, "cuda": 10}


@dataclass(frozen=True)
class Setting:
    """What all candidates train on: one process's batch of noise, MoCo v2's model."""

    arch: str
    batch_size: int
    image_size: int
    device: str


@dataclass(frozen=True)
class Candidate:
    """A way of taking the step.

    Args:
        ours: or the official code's.
        amp: a key of AMP_DTYPES.
        compiled: one of COMPILED.
        channels_last: the memory format, which ours always has.
        bn_groups: of ours; the official code has one on a GPU.
        deterministic: whether kernels are to give the same bits each time.
    """

    ours: bool
    amp: str = "none"
    compiled: str = "off"
    channels_last: bool = True
    bn_groups: int = 1
    deterministic: bool = False

    def __str__(self) -> str:
        words = ["ours" if self.ours else "official", NAMES[self.amp]]
        if not self.ours and self.channels_last:
            words.append("channels_last")
        if self.ours:
            words.append(f"{self.bn_groups} BN group" + "s" * (self.bn_groups > 1))
        words += {"off": [], "on": ["compiled"], "graphs": ["compiled, CUDA graphs"]}[self.compiled]
        if self.deterministic:
            words.append("deterministic")
        return ", ".join(words)


@dataclass(frozen=True)
class Timing:
    """Of a step: the median, and the most memory that a process takes for it, of a GPU its own."""

    seconds: float
    bytes: int


def candidates(
    setting: Setting, amps: list[str], groups: list[int], compiled: list[str], deterministic: bool
) -> list[Candidate]:
    """The official code's forms, then ours: every value once, beside the last of all others.

    Raises UserError for a batch that cannot be split into `groups`; none: those of main.py.
    """
    batch_size, wanted = setting.batch_size, groups or [None]
    choose = [choose_bn_groups(batch_size, 1, number, number is None) for number in wanted]
    forms = [Candidate(False, channels_last=False)]
    for amp in (amp for amp in amps if amp != "fp16"):  # which takes more than a line or two
        forms += [Candidate(False, amp, channels_last=last) for last in (False, True)]
        forms += [Candidate(False, amp, way) for way in compiled if way == "on"]
    base = Candidate(True, amps[-1], compiled[-1], bn_groups=choose[-1])
    forms += [replace(base, amp=amp) for amp in amps]
    forms += [replace(base, bn_groups=number) for number in choose]
    forms += [replace(base, compiled=way) for way in compiled]
    if deterministic:
        forms.append(replace(base, compiled="off", deterministic=True))
    return list(dict.fromkeys(forms))


def time_steps(
    setting: Setting, forms: Iterable[Candidate], rounds: int
) -> dict[Candidate, Timing]:
    """Each candidate's step, in turn with the others'."""
    gpu = setting.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is available here; pass --device cpu")
    steps, memory = {}, {}
    # Every candidate compiles the same code for parameters of its own.
    with _one_process(gpu), torch._dynamo.config.patch(cache_size_limit=64):
        for form in forms:
            steps[form], memory[form] = _built(setting, form)
        repeats = STEPS[setting.device]
        bursts = {form: lambda f=f: [f() for _ in range(repeats)] for form, f in steps.items()}
        seconds = alternate(bursts, rounds, torch.cuda.synchronize if gpu else None)
    if not gpu:
        memory = {form: _memory_of_process(setting, form) for form in steps}
    return {form: Timing(seconds[form] / repeats, memory[form]) for form in steps}


def best_official(timings: dict[Candidate, Timing]) -> Candidate:
    """The fastest form of what users come from, compiled or not."""
    return min((form for form in timings if not form.ours), key=lambda form: timings[form].seconds)


COLUMNS = ("step", "ms", "images/s", "times the published", "times the best official", "memory")


def table_rows(setting: Setting, timings: dict[Candidate, Timing]) -> list[list[str]]:
    """Cells under COLUMNS, a row for each candidate."""
    published = timings[next(iter(timings))].seconds
    best = timings[best_official(timings)].seconds
    return [
        [
            str(form),
            f"{1000 * timing.seconds:.1f}",
            f"{setting.batch_size / timing.seconds:,.1f}",
            f"{published / timing.seconds:.2f}",
            f"{best / timing.seconds:.2f}",
            f"{timing.bytes / 2**30:.2f} GiB",
        ]
        for form, timing in timings.items()
    ]


# -- the official code ----------------------------------------------------------------------------


class PlainMoCo(nn.Module):
    """Algorithm 1 with shuffled BN over processes, written down plainly: the reference.

    One loop over parameters for the momentum update, `all_gather` of the images, of the keys for
    the unshuffle and of the keys for the queue, a copy of the queue in every step, and a loss that
    is read in every step.
    """

    def __init__(self, arch: str, dim: int = 128, queue_size: int = 65536, m=0.999, tau=0.2):
        super().__init__()
        self.m, self.tau = m, tau
        self.f_q = build_encoder(arch, dim, mlp=True)
        self.f_k = build_encoder(arch, dim, mlp=True).requires_grad_(False)
        self.f_k.load_state_dict(self.f_q.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.position = 0

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        x_q: Tensor,
        x_k: Tensor,
        dtype: torch.dtype | None = None,
    ) -> float:
        """One iteration on float views N x 3 x H x W; `dtype` is autocast's, None for float32."""
        with torch.autocast(x_q.device.type, dtype, enabled=dtype is not None):
            logits, k = self(x_q, x_k)
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        keys = _all_gather(k)
        self.queue[:, self.position : self.position + len(keys)] = keys.T
        self.position = (self.position + len(keys)) % self.queue.shape[1]
        return loss.item()

    def forward(self, x_q: Tensor, x_k: Tensor) -> tuple[Tensor, Tensor]:
        """Logits N x (1+K) and keys N x C."""
        q = F.normalize(self.f_q(x_q), dim=1)
        with torch.no_grad():
            for p_q, p_k in zip(self.f_q.parameters(), self.f_k.parameters(), strict=True):
                p_k.data = p_k.data * self.m + p_q.data * (1.0 - self.m)
            order = torch.randperm(len(x_k), device=x_k.device)
            dist.broadcast(order, 0)
            k = F.normalize(self.f_k(_all_gather(x_k)[order]), dim=1)
            k = _all_gather(k)[torch.argsort(order)]
        l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        return torch.cat([l_pos, l_neg], dim=1) / self.tau, k


def _all_gather(tensor: Tensor) -> Tensor:
    gathered = [torch.ones_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.cat(gathered)


def _official_step(setting: Setting, form: Candidate) -> Callable:
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    model = PlainMoCo(setting.arch).to(setting.device, memory_format=layout)
    if form.compiled != "off":
        model.f_q.compile()
        model.f_k.compile()
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=setting.device).view(2, 3, 1, 1)
    # The reference's workers normalise; it receives floats, and that is not timed.
    x_q, x_k = (
        ((view.permute(0, 3, 1, 2) - mean) / std).contiguous(memory_format=layout)
        for view in _noise(setting)
    )
    return lambda: model.step(optimizer, x_q, x_k, AMP_DTYPES[form.amp])


# -- ours -----------------------------------------------------------------------------------------


def _our_step(setting: Setting, form: Candidate) -> Callable:
    model = MoCo(
        build_encoder(setting.arch, mlp=True), temperature=0.2, bn_groups=form.bn_groups
    ).to(setting.device, memory_format=torch.channels_last)
    if form.compiled != "off":
        model.compile_encoders(cuda_graphs=form.compiled == "graphs")
    optimizer = ScheduledSGD(model, 0.03, 0.9, 1e-4, scale_gradients=form.amp == "fp16")
    dtype = AMP_DTYPES[form.amp]
    task = MoCoPretraining(model, InfoNCE(), optimizer, None, seed=0, dtype=dtype)
    batch = SimpleNamespace(views=_noise(setting), indices=torch.arange(setting.batch_size))
    numbers = itertools.count()

    def step():
        with _deterministic(form.deterministic):
            return task.step(batch, next(numbers))

    return step


@contextmanager
def _deterministic(wanted: bool):
    if wanted:
        use_deterministic_kernels(True)
    try:
        yield
    finally:
        if wanted:
            use_deterministic_kernels(False)


# -- both -----------------------------------------------------------------------------------------


def _one_process(gpu: bool):
    """The official code gathers from all processes, also where there is one."""
    return process_group(free_local_url(), 0, 1, local_rank=0, backend="nccl" if gpu else None)


def _noise(setting: Setting) -> list[Tensor]:
    """Two views, uint8 N x H x W x 3."""
    torch.manual_seed(0)
    shape = (setting.batch_size, setting.image_size, setting.image_size, 3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device) for _ in "qk"]


def _built(setting: Setting, form: Candidate) -> tuple[Callable, int]:
    """The candidate's step, and what a GPU has to hold for it at most, with no other candidate."""
    on_gpu = setting.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    step = (_our_step if form.ours else _official_step)(setting, form)
    if not on_gpu:
        return step, 0
    step()  # compiles, and makes the optimizer's state
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def _memory_of_process(setting: Setting, form: Candidate) -> int:
    """Bytes that a process of its own takes at most for two steps."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (setting, form))


def _peak(setting: Setting, form: Candidate) -> int:
    with _one_process(gpu=False):
        step, _ = _built(setting, form)
        for _ in range(2):  # the second also holds the optimizer's momentum
            step()
    return peak_memory_of_process(torch.device(setting.device))
