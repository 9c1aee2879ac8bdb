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
    data         of tar shards: how they are dealt to streams, and where each of these stands; of
                 a folder: how many images, and a hash of their names
    classes      of a classifier: their names
    config       the flags of the run
"""

import os
import pickle
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moco_det.common.errors import UserError
from moco_det.common.files import replacing
from moco_det.common.processes import all_objects

LAST = "checkpoint_last.pth.tar"


class Checkpoint(NamedTuple):
    """What a run continues from; `path` is for messages."""

    path: Path
    state: dict


def find(resume: str, output: Path) -> Checkpoint | None:
    """The checkpoint `resume`: a path, "auto" for the last one of `output`, if any, or ""."""
    path = output / LAST if resume == "auto" else Path(resume)
    if not resume or (resume == "auto" and not path.exists()):
        return None
    return Checkpoint(path, load(path))


def restart_epoch(checkpoint: Checkpoint) -> Checkpoint:
    """The same, at the beginning of its epoch, whatever images that is to be counted in."""
    path, state = checkpoint
    data = {k: v for k, v in state.get("data", {}).items() if k not in ("images", "hash")}
    return Checkpoint(path, state | {"step_in_epoch": 0, "data": data})


def save(state: dict, path: Path) -> None:
    """Write `path` whole or not at all. Raises UserError where the disk is full."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        kept = f"the previous {path} is intact" if path.exists() else "no earlier one exists"
        raise UserError(f"could not save {path} (disk full?): {error}; {kept}") from error


def keep_epoch(output: Path, epoch: int, keep: int, save_every: int) -> None:
    """Keep the last checkpoint, by a hard link, under its epoch's own name; prune older epochs.

    The newest `keep` epochs stay, and each `save_every`-th epoch for good (0: none).
    """
    numbered = output / f"checkpoint_{epoch:04d}.pth.tar"
    numbered.unlink(missing_ok=True)
    os.link(output / LAST, numbered)
    for path in sorted(output.glob("checkpoint_[0-9]*.pth.tar"))[:-keep]:
        older = int(path.name.split("_")[1].split(".")[0])
        if not (save_every and older % save_every == 0):
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


def check_arch(checkpoint: Checkpoint, arch: str) -> None:
    """Raises UserError where the checkpoint is of another encoder than `arch`."""
    path, state = checkpoint
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} holds a {state['arch']}, not a {arch}: pass -a {state['arch']}")


def weights(state: dict) -> dict[str, torch.Tensor]:
    """The model's state under its own names, without DistributedDataParallel's prefix."""
    return {name.removeprefix("module."): value for name, value in state["state_dict"].items()}


def load_model(model: torch.nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """Load `state_dict` strictly. Raises UserError that names what does not fit."""
    path, state = checkpoint
    check_arch(checkpoint, arch)
    try:
        model.load_state_dict(weights(state))
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
    return all_objects(mine)


def restore_rng(state: dict) -> None:
    """Set this process's generators to `state`, one entry of `rng_states`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
