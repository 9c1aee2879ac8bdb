"""How a run uses its device: draws and kernels of a seed, precision, compiled encoders."""

import os
import random
import time
from collections.abc import Sequence

import numpy as np
import torch

from moco_det.common.errors import UserError, one_line
from moco_det.common.gpus import has_bfloat16
from moco_det.common.processes import all_objects, from_main, print_on_main
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.optimization import AMP_DTYPES
from pretrain.moco.instance_discrimination import InstanceDiscrimination

COMPILE = ("auto", "on", "off")
# Steps. Compiling takes about a minute, and saves some hundredths of a second in each.
PAYS_FROM = 2000
# Whether compiled encoders are replayed as CUDA graphs: for the benchmark to decide, on a GPU.
CUDA_GRAPHS = False


def seed_run(wanted: int | None, checkpoint: Checkpoint | None, deterministic: bool = False) -> int:
    """Seed this process's generators; the seed, which all processes agree on. Collective.

    It is the one `wanted`, else that of the run to be resumed, else a random one. With it data,
    views and shuffles are settled; what a GPU computes from them is so to rounding.

    Args:
        deterministic: also to the bit, by kernels that take longer.
    """
    seed = wanted
    if seed is None and checkpoint:
        seed = checkpoint.state.get("config", {}).get("seed")
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    seed = from_main(seed)
    for seed_generator in (torch.manual_seed, random.seed, np.random.seed):
        seed_generator(seed)
    use_deterministic_kernels(deterministic)
    return seed


def use_deterministic_kernels(wanted: bool) -> None:
    """On a GPU, have every operation give the same bits each time. CPUs do so in any case.

    PyTorch warns of an operation that has no such kernel. Without, cuDNN tries which of its
    algorithms are fastest.
    """
    torch.backends.cudnn.benchmark = not wanted
    torch.backends.cudnn.deterministic = wanted
    wanted &= torch.cuda.is_available()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no bit


def settle_precision(wanted: str, device: torch.device, checkpoint: Checkpoint | None) -> str:
    """The name in AMP_DTYPES for --amp `wanted`.

    "auto" is what the run to be resumed has used; in a new run bf16 where the GPU computes in it,
    else float32.
    """
    if wanted != "auto":
        return wanted
    if checkpoint:  # the official code writes no flags, and has float32
        before = checkpoint.state.get("config", {}).get("amp", "none")
        if before not in AMP_DTYPES:
            raise UserError(f"{checkpoint.path}: entry config.amp is {one_line(before, 60)}")
        return before
    if device.type != "cuda" or not has_bfloat16(device):
        return "none"
    print_on_main("mixed precision: bf16 (--amp none for float32, the paper's)")
    return "bf16"


def settle_compilation(wanted: str, device: torch.device, steps: int) -> bool:
    """Whether to compile the encoders of a run with that many `steps` to go."""
    if wanted != "auto" or device.type != "cuda":
        return wanted == "on"
    reason = None
    if torch.are_deterministic_algorithms_enabled():
        reason = "--deterministic, and the compiler takes whatever kernels it finds the fastest"
    elif steps < PAYS_FROM:
        reason = f"a run of {steps} steps ends before it pays; --compile on does it in any case"
    if reason:
        print_on_main(f"encoders are not compiled: {reason}")
    return reason is None


def compile_encoders(
    model: InstanceDiscrimination,
    images: torch.Tensor,
    dtype: torch.dtype | None,
    required: bool,
    backend: str = "inductor",
    small: Sequence[torch.Tensor] = (),
) -> None:
    """Compile the model's encoders, or say in a line why not. Collective.

    Args:
        images: views of this process's images, uint8, N x H x W x 3, the shape of every step.
        dtype: of mixed precision; None for float32.
        required: whether it is an error if it does not work.
        small: multi-crop's small views of the same images.

    Raises:
        UserError: it is required and does not work.
    """
    print_on_main("compiling the encoders: about a minute, less where PyTorch's cache has them")
    begun, problem = time.perf_counter(), None
    model.compile_encoders(backend, CUDA_GRAPHS)
    try:
        model.rehearse(images, dtype, small)
    except torch.OutOfMemoryError:
        raise  # not for want of a compiler
    except Exception as error:  # what a compiler and its drivers may raise is without end
        problem = one_line(getattr(error, "inner_exception", error), 160)
    problems = [text for text in all_objects(problem) if text]  # what one cannot do, none does
    if not problems:
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # the compiler sets it to its default
        kept = f", kept in {kept}" if kept else ""
        print_on_main(f"compiled in {time.perf_counter() - begun:.0f} s{kept}")
        return
    if required:
        raise UserError(f"--compile on: {problems[0]}")
    print_on_main(f"encoders are not compiled: {problems[0]}")
    model.use_plain_encoders()
