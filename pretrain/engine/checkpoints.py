"""Checkpoints that survive a kill, a full disk and a change of launch.

Schema (a plain dict, loadable with `weights_only=True`); the first four entries are those of
facebookresearch/moco, so its tools read our files and this file reads its released ones:
    epoch        epochs completed
    arch         torchvision's name of the encoder; the class of a backbone that a program gave
    state_dict   "module.encoder_q...", "module.encoder_k...", "module.queue", "module.queue_ptr";
                 a memory bank has "module.bank" for the last three, end-to-end nothing; kNN-MoCo
                 has "module.queue_backbone" as well
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
    numbered_from  the number in the name of the first epoch's checkpoint

Names are those of facebookresearch/moco: `checkpoint_0199.pth.tar` is the last of 200 epochs. Runs
that were begun before we adopted them count from 1, and go on to do so.
"""

import os
import random
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moco_det.common.checkpoint_files import UnreadableFile, read_checkpoint
from moco_det.common.errors import UserError, tells_of_a_worker
from moco_det.common.files import replacing
from moco_det.common.processes import all_objects, print_on_main
from moco_det.common.resume_state import (
    check_count,
    check_dict,
    check_generators,
    check_list,
    check_number,
    check_scaler,
    check_text,
    entries_of,
    newest_whole,
)
from moco_det.common.run_folders import RunFiles, claimed
from moco_det.common.weight_checks import checked_weights, describe_stripping, unwrapped
from moco_det.common.weight_layouts import given_backbone

LAST = "checkpoint_last.pth.tar"
NUMBERED = "checkpoint_{:04d}.pth.tar"

RUN_FILES = RunFiles(
    marks=("checkpoint_*.pth.tar",),
    others=("metrics.jsonl", "events.out.tfevents.*", "trackers.json"),
    flag="--output",
    resume="--resume auto",
)


class Checkpoint(NamedTuple):
    """What a run continues from; `path` is for messages."""

    path: Path
    state: dict


def claimed_output(
    output: Path, resume: str, overwrite: bool, pretrained: str = ""
) -> AbstractContextManager[None]:
    """Hold the folder of a run, while open; see `files.claimed`. Collective.

    Args:
        resume: as for `find`.
        pretrained: a checkpoint that the run reads.
    """
    path = output / LAST if resume == "auto" else Path(resume)
    goes_on = path.is_file() and path.resolve().parent == output.resolve()
    return claimed(output, RUN_FILES, not goes_on, overwrite, [resume, pretrained])


def find(resume: str, output: Path) -> Checkpoint | None:
    """The checkpoint `resume`: a path, "auto" for the last one of `output`, if any, or "".

    Where the last one is damaged, "auto" is the newest one beside it that is whole.

    Raises:
        UserError: there is none at the path, or it cannot be resumed from.
    """
    if resume and resume != "auto":
        return Checkpoint(Path(resume), load_resumable(Path(resume)))
    last = output / LAST
    if not resume or not os.path.lexists(last):
        return None
    others = output.glob("checkpoint_*.pth.tar")  # also the best one of a classifier
    return Checkpoint(*newest_whole(last, others, load_resumable))


def restart_epoch(checkpoint: Checkpoint) -> Checkpoint:
    """The same, at the beginning of its epoch, whatever images that is to be counted in."""
    path, state = checkpoint
    data = {k: v for k, v in state.get("data", {}).items() if k not in ("images", "hash")}
    return Checkpoint(path, state | {"step_in_epoch": 0, "data": data, "restarted": True})


def numbered_from(state: dict) -> int:
    """The number in the name of the first epoch's checkpoint, in the run that `state` is of."""
    begun_earlier = "config" in state  # by us: the official code writes none
    return state.get("numbered_from", 1 if begun_earlier else 0)


def save(state: dict, path: Path) -> None:
    """Write `path` whole or not at all. Raises UserError where the disk is full."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        if tells_of_a_worker(error):
            raise
        kept = f"the previous {path} is intact" if path.exists() else "no earlier one exists"
        raise UserError(f"could not save {path} (disk full?): {error}; {kept}") from error


def keep_epoch(output: Path, epoch: int, keep: int, save_every: int, first: int = 0) -> None:
    """Keep the last checkpoint under its epoch's own name; prune older epochs.

    The newest `keep` epochs up to this one stay, and each `save_every`-th for good (0: none). Later
    ones, which are there after a return to an earlier checkpoint, are left alone.

    Args:
        epoch: counted from 1.
        first: the number of the first epoch's name.

    Raises:
        UserError: the disk is full.
    """
    numbered = output / NUMBERED.format(epoch - 1 + first)
    try:
        with replacing(numbered) as temporary:
            link_or_copy(output / LAST, temporary)
    except OSError as error:
        raise UserError(f"could not save {numbered} (disk full?): {error}") from error
    older = sorted(path for path in output.glob("checkpoint_[0-9]*.pth.tar") if path <= numbered)
    for path in older[:-keep]:
        number = int(path.name.split("_")[1].split(".")[0]) + 1 - first
        if not (save_every and number % save_every == 0):
            path.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for `source`; a copy on file systems without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def load(path: Path) -> dict:
    """Read a checkpoint safely, on the CPU, its weights checked and under the official names.

    Raises UserError for anything that is none."""
    if not os.path.lexists(path):
        raise UserError(f"no checkpoint at {path}")
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise UnreadableFile(f"{path} is not a MoCo checkpoint: it has no 'state_dict'")
    weights = checked_weights(path, state["state_dict"])
    names = unwrapped(weights)
    beyond = {old: new for old, new in names.items() if old.removeprefix("module.") != new}
    if beyond:
        print_on_main(f"{path}: {describe_stripping(beyond)}")
        weights = {f"module.{names[old]}": value for old, value in weights.items()}
    tell_of_later_epoch(path, state)
    return state | {"state_dict": weights}


def load_resumable(path: Path) -> dict:
    """`load`, and all that a run continues from is of the schema above.

    The optimizer is checked where there is one to compare it with, see `ScheduledSGD.load_state`.
    """
    state = load(path)
    with entries_of(path):
        check_text("arch", state.get("arch", ""))
        for name in ("epoch", "step", "step_in_epoch", "numbered_from"):
            if name in state or name == "epoch":
                check_count(name, state.get(name))
        config = check_dict("config", state.get("config", {}))
        for name, largest in (("batch_size", 2**31), ("seed", 2**63)):
            if config.get(name) is not None:
                check_count(f"config.{name}", config[name], largest)
        check_text("config.amp", config.get("amp", "none"))
        check_dict("loss", state.get("loss", {}))
        check_scaler(state.get("scaler", {}))
        check_number("best_acc1", state.get("best_acc1", 0.0), -1, 100)
        for index, generators in enumerate(check_list("rng", state.get("rng", []))):
            check_generators(f"rng[{index}]", generators)
        _check_positions(check_dict("data", state.get("data", {})))
        _check_queue(weights(state))
    return state


def _check_positions(data: dict) -> None:
    for name, value in data.items():
        if name == "processes":
            for index, process in enumerate(check_list("data.processes", value)):
                place = f"data.processes[{index}]"
                process = check_dict(place, process)
                check_count(f"{place}.turn", process.get("turn"))
                positions = check_list(f"{place}.positions", process.get("positions"))
                for position in positions:
                    for number in check_list(f"{place}.positions", position, 2):
                        check_count(f"{place}.positions", number)


def _check_queue(arrays: dict[str, torch.Tensor]) -> None:
    if "queue" in arrays and "queue_ptr" in arrays:
        check_count("queue_ptr", int(arrays["queue_ptr"]), arrays["queue"].shape[-1] - 1)


def tell_of_later_epoch(path: Path, state: dict) -> None:
    """Where a run counts from 1, the official code's name of its last epoch is that before it."""
    epoch = state.get("epoch")
    if isinstance(epoch, int) and numbered_from(state) and path.name == NUMBERED.format(epoch):
        later = path.with_name(NUMBERED.format(epoch + 1))
        if later.is_file():
            print_on_main(f"{path} is of epoch {epoch}: its run counts from 1 and has {later.name}")


def check_arch(checkpoint: Checkpoint, arch: str) -> None:
    """Raises UserError where the checkpoint is of another encoder than `arch`."""
    path, state = checkpoint
    if state.get("arch", arch) == arch:
        return
    given = given_backbone(state)
    if given:
        raise UserError(
            f"{path} holds the backbone of a Python program, a {given}, not a {arch}: resume it by "
            "pretrain.pretrain with that backbone"
        )
    raise UserError(f"{path} holds a {state['arch']}, not a {arch}: pass -a {state['arch']}")


def weights(state: dict) -> dict[str, torch.Tensor]:
    """The model's state under its own names, without DistributedDataParallel's prefix."""
    return {name.removeprefix("module."): value for name, value in state["state_dict"].items()}


def load_model(model: torch.nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """Load `state_dict` strictly. Raises UserError that names what does not fit."""
    path, state = checkpoint
    check_arch(checkpoint, arch)
    held = weights(state)
    wrong = misfit(model.state_dict(), held)
    if wrong:
        raise UserError(
            f"{path} does not fit this model; check --moco-dim, --moco-k, --mlp and --small-stem: "
            f"{wrong}"
        )
    model.load_state_dict(held)


def misfit(wanted: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> str:
    """In a few words the first arrays that keep `held` from filling `wanted`, or ""."""
    faults = [f"{name} is missing" for name in wanted if name not in held]
    faults += [f"{name} is unexpected" for name in held if name not in wanted]
    faults += [
        f"{name} has the shape {tuple(held[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in held and held[name].shape != value.shape
    ]
    return "; ".join(faults[:2]) + (f" and {len(faults) - 2} more" if len(faults) > 2 else "")


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
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
