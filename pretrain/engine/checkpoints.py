"""Checkpoints that survive a kill, a full disk and a change of launch.

Schema (a plain dict, loadable with `weights_only=True`); the first four entries are those of
facebookresearch/moco, so its tools read our files and this file reads its released ones:
    epoch        epochs completed
    arch         torchvision's name of the encoder
    state_dict   "module.encoder_q...", "module.encoder_k...", "module.queue", "module.queue_ptr";
                 a memory bank has "module.bank" for the last three, end-to-end nothing
    optimizer    SGD's state
    step         steps taken in all
    step_in_epoch  steps taken beyond the completed epochs
    loss         state of the loss: NCE's constant
    scaler       state of the fp16 gradient scaler
    rng          one entry per process: states of torch, CUDA, Python and NumPy
    data         of tar shards: how they are dealt to streams, and where each of these stands
    config       the flags of the run
"""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moco_det.common.errors import UserError
from moco_det.common.files import replacing
from moco_det.common.processes import world_size

LAST = "checkpoint_last.pth.tar"


def save(state: dict, path: Path) -> None:
    """Write `path` whole or not at all. Raises UserError where the disk is full."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        kept = f"the previous {path} is intact" if path.exists() else "no earlier one exists"
        raise UserError(f"could not save {path} (disk full?): {error}; {kept}") from error


def save_epoch(state: dict, output: Path, keep: int, save_every: int) -> None:
    """Save as the last checkpoint and, by a hard link, under the epoch's own name; prune old ones.

    The newest `keep` epochs stay, and each `save_every`-th epoch for good (0: none).
    """
    save(state, output / LAST)
    numbered = output / f"checkpoint_{state['epoch']:04d}.pth.tar"
    numbered.unlink(missing_ok=True)
    os.link(output / LAST, numbered)
    for path in sorted(output.glob("checkpoint_[0-9]*.pth.tar"))[:-keep]:
        epoch = int(path.name.split("_")[1].split(".")[0])
        if not (save_every and epoch % save_every == 0):
            path.unlink()


def load(path: Path) -> dict:
    """Read a checkpoint safely, on the CPU. Raises UserError for anything that is none."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint that can be read safely: {error}") from error
    if not isinstance(state, dict) or "state_dict" not in state:
        raise UserError(f"{path} is not a MoCo checkpoint: it has no 'state_dict'")
    return state


def load_model(model: torch.nn.Module, state: dict, path: Path, arch: str) -> None:
    """Load `state_dict` strictly. Raises UserError that names what does not fit."""
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} holds a {state['arch']}, not a {arch}: pass -a {state['arch']}")
    weights = {k.removeprefix("module."): v for k, v in state["state_dict"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit this model; check --moco-dim, --moco-k, --mlp and --small-stem. "
            f"{error}"
        ) from error


def model_state(model: torch.nn.Module) -> dict:
    """The model's state under the names of the official code's DistributedDataParallel."""
    return {f"module.{name}": value for name, value in model.state_dict().items()}


def rng_states() -> list[dict]:
    """The generators' states of every process, in order of rank. Collective."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    mine = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }
    if world_size() == 1:
        return [mine]
    states = [None] * world_size()
    dist.all_gather_object(states, mine)
    return states


def restore_rng(state: dict) -> None:
    """Set this process's generators to `state`, one entry of `rng_states`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
