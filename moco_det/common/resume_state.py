"""What a run continues from, checked before anything takes it over; the newest file that is whole.

A network's weights are `moco_det.common.weight_checks`' business. Here: counts, optimizer,
schedule, gradient scaler and generators, each against the schema of what writes it.
"""

import contextlib
import math
import os
import random
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moco_det.common.checkpoint_files import UnreadableFile
from moco_det.common.errors import UserError
from moco_det.common.processes import print_on_main

Content = TypeVar("Content")

MAX_COUNT = 2**31 - 1  # of epochs and steps


class StateFault(Exception):
    """What is wrong with one entry, in words that begin with its name."""


@contextlib.contextmanager
def entries_of(path: str | Path):
    """Turn a StateFault into one line about the file."""
    try:
        yield
    except StateFault as fault:
        raise UnreadableFile(f"cannot resume from {path}: {fault}") from fault


# -- values ---------------------------------------------------------------------------------------


def _refuse(name: str, value: object, wanted: str) -> StateFault:
    shown = f"a {type(value).__name__}"
    if isinstance(value, bool | int | float | str | None):
        shown = reprlib.repr(value)
    return StateFault(f"{name} is {shown}, not {wanted}")


def check_count(name: str, value: object, largest: int = MAX_COUNT) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise _refuse(name, value, f"a whole number from 0 to {largest}")
    return value


def check_number(name: str, value: object, least: float = 0.0, largest: float = 1e30) -> float:
    """NaN is no number. A bool is none, though Python's is an int."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= largest:
        raise _refuse(name, value, f"a number from {least:g} to {largest:g}")
    return value


def check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refuse(name, value, "a word")
    return value


def check_dict(name: str, value: object) -> dict:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _refuse(name, value, "a dict of named entries")
    return value


def check_list(name: str, value: object, length: int | None = None) -> list | tuple:
    if not isinstance(value, list | tuple) or length not in (None, len(value)):
        raise _refuse(name, value, "a list" if length is None else f"a list of {length}")
    return value


# -- parts of a run -------------------------------------------------------------------------------

_SWITCHES = (
    *("nesterov", "maximize", "differentiable", "foreach", "fused", "amsgrad", "capturable"),
    "decoupled_weight_decay",
)
_RATES = ("lr", "initial_lr", "momentum", "dampening", "weight_decay", "eps")
_OFFICIAL = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "params"}


def check_optimizer(saved: object, optimizer: Optimizer, stepped: bool, own: bool = True) -> None:
    """Check the state of SGD or Adam against the optimizer that is to take it over.

    Args:
        saved: what `optimizer.state_dict()` was.
        stepped: whether the run has changed its parameters, so that each that is trained has its
            moments: a state without would start them from zero, silently.
        own: written by this project; older torch, which the official code ran on, wrote fewer keys.

    Raises:
        StateFault: names the entry.
    """
    saved = check_dict("optimizer", saved)
    groups = optimizer.param_groups
    ours = optimizer.state_dict()["param_groups"]
    found = check_list("optimizer.param_groups", saved.get("param_groups"))
    if len(found) != len(groups):
        raise StateFault(
            f"optimizer.param_groups are {len(found)}, not {len(groups)}: it is from another "
            "configuration"
        )
    for index, (group, mine) in enumerate(zip(found, ours, strict=True)):
        _check_group(f"optimizer.param_groups[{index}]", group, mine, own)
    parameters = [p for group in groups for p in group["params"]]
    order = [i for group in found for i in group["params"]]
    state = saved.get("state")
    if not isinstance(state, dict) or not all(type(key) is int for key in state):
        raise _refuse("optimizer.state", state, "a dict by the numbers of parameters")
    unknown = state.keys() - set(order)
    if unknown:
        raise StateFault(f"optimizer.state has a parameter {min(unknown)} that is in no group")
    adam = "betas" in groups[0]
    momentum = adam or any(group["momentum"] for group in found)
    for index, parameter in zip(order, parameters, strict=True):
        needed = stepped and momentum and parameter.requires_grad
        check = _check_adam if adam else _check_momentum
        check(f"optimizer.state[{index}]", state.get(index), parameter, needed)


def _check_group(name: str, group: object, mine: Mapping[str, object], own: bool) -> None:
    group = check_dict(name, group)
    # What a schedule or a newer torch has added may be absent from an older file.
    needed = mine.keys() - {"initial_lr", "decoupled_weight_decay"} if own else _OFFICIAL
    missing = needed - group.keys()
    if missing:
        raise StateFault(f"{name} lacks {', '.join(sorted(missing))}")
    for key in _RATES:
        if key in group:
            check_number(f"{name}.{key}", group[key])
    for key in _SWITCHES:
        if key in group and not (isinstance(group[key], bool) or group[key] is None):
            raise _refuse(f"{name}.{key}", group[key], "true or false")
    if "betas" in mine:
        for beta in check_list(f"{name}.betas", group["betas"], 2):
            check_number(f"{name}.betas", beta, largest=1.0)
    if group.get("foreach") and group.get("fused"):
        raise StateFault(f"{name} has both foreach and fused set")
    numbers = check_list(f"{name}.params", group["params"])
    if list(numbers) != mine["params"]:
        raise StateFault(
            f"{name}.params are {len(numbers)} parameters, not the {len(mine['params'])} of this "
            "model in their order: it is from another configuration"
        )


def _check_momentum(name: str, entry: object, parameter: torch.Tensor, needed: bool) -> None:
    buffer = None if entry is None else check_dict(name, entry).get("momentum_buffer")
    if buffer is None:
        if needed:
            raise StateFault(f"{name} has no momentum_buffer: the momentum would be lost")
        return
    _check_moment(f"{name}.momentum_buffer", buffer, parameter)


def _check_adam(name: str, entry: object, parameter: torch.Tensor, needed: bool) -> None:
    entry = {} if entry is None else check_dict(name, entry)
    for moment in ("exp_avg", "exp_avg_sq"):
        if moment in entry:
            _check_moment(f"{name}.{moment}", entry[moment], parameter)
        elif entry or needed:
            raise StateFault(f"{name} has no {moment}: the moments would be lost")
    step = entry.get("step")
    if entry and not (isinstance(step, torch.Tensor) and step.numel() == 1 and step >= 0):
        raise _refuse(f"{name}.step", step, "a tensor of the steps taken")
    if entry and (entry["exp_avg_sq"] < 0).any():
        raise StateFault(f"{name}.exp_avg_sq is negative, and no mean of squares")


def _check_moment(name: str, buffer: object, parameter: torch.Tensor) -> None:
    if not isinstance(buffer, torch.Tensor) or not buffer.is_floating_point():
        raise _refuse(name, buffer, "a tensor of floats")
    if buffer.shape != parameter.shape:
        shapes = f"{tuple(buffer.shape)}, not {tuple(parameter.shape)}"
        raise StateFault(f"{name} has the shape {shapes}: it is from another configuration")
    if not buffer.isfinite().all():
        raise StateFault(f"{name} is not finite")


def check_scaler(saved: object) -> dict:
    """The state of a gradient scaler; {} of one that is off."""
    saved = check_dict("scaler", saved)
    if saved:
        for key in ("scale", "growth_factor", "backoff_factor"):
            check_number(f"scaler.{key}", saved.get(key), least=1e-30)
        for key in ("growth_interval", "_growth_tracker"):
            check_count(f"scaler.{key}", saved.get(key))
    return saved


def checked_schedule(saved: object, scheduler: LRScheduler, steps: int) -> dict:
    """The entries of a saved schedule that `scheduler` has too.

    `LRScheduler.load_state_dict` would overwrite any attribute, its methods among them.

    Args:
        steps: that the run has taken, on which the schedule must stand.
    """
    saved = check_dict("scheduler", saved)
    groups = len(scheduler.optimizer.param_groups)
    for key in ("base_lrs", "_last_lr"):
        for rate in check_list(f"scheduler.{key}", saved.get(key), groups):
            check_number(f"scheduler.{key}", rate)
    last = check_count("scheduler.last_epoch", saved.get("last_epoch"))
    check_count("scheduler._step_count", saved.get("_step_count"))
    if last != steps:
        raise StateFault(f"scheduler.last_epoch is {last} after {steps} steps")
    known = scheduler.state_dict()
    for key in known.keys() & saved.keys():
        if isinstance(known[key], bool) and not isinstance(saved[key], bool):
            raise _refuse(f"scheduler.{key}", saved[key], "true or false")
    for multiplier in check_list("scheduler.lr_lambdas", saved.get("lr_lambdas", [None] * groups)):
        if multiplier is not None:
            raise _refuse("scheduler.lr_lambdas", multiplier, "a list of nothing")
    return {key: value for key, value in saved.items() if key in known}


def check_generators(name: str, saved: object) -> None:
    """One process's states of torch, CUDA, Python and NumPy, as `pretrain` saves them."""
    saved = check_dict(name, saved)
    states = [(f"{name}.torch", saved.get("torch"))]
    states += [(f"{name}.cuda", s) for s in check_list(f"{name}.cuda", saved.get("cuda"))]
    for place, state in states:
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise _refuse(place, state, "a tensor of bytes")
    _try(f"{name}.torch", torch.Generator().set_state, saved["torch"])
    version, numbers, gauss = check_list(f"{name}.python", saved.get("python"), 3)
    for number in check_list(f"{name}.python[1]", numbers, 625):
        check_count(f"{name}.python[1]", number, 2**32 - 1)
    _check_gauss(f"{name}.python[2]", gauss)
    _try(f"{name}.python", random.Random().setstate, (version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, gauss = check_list(f"{name}.numpy", saved.get("numpy"), 5)
    if kind != "MT19937":
        raise _refuse(f"{name}.numpy[0]", kind, "'MT19937'")
    if not isinstance(keys, torch.Tensor) or keys.shape != (624,) or keys.dtype != torch.int64:
        raise _refuse(f"{name}.numpy[1]", keys, "624 whole numbers")
    if keys.min() < 0 or keys.max() >= 2**32:
        raise StateFault(f"{name}.numpy[1] has numbers outside 0 to 2^32 - 1")
    check_count(f"{name}.numpy[2]", position, 624)
    check_count(f"{name}.numpy[3]", has_gauss, 1)
    _check_gauss(f"{name}.numpy[4]", gauss)
    state = (kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    _try(f"{name}.numpy", np.random.RandomState().set_state, state)


def _check_gauss(name: str, value: object) -> None:
    """The second of two normal draws, kept for the next; they come in pairs."""
    if value is not None:
        check_number(name, value, -1e3, 1e3)


def _try(name: str, set_state: Callable, state: object) -> None:
    try:
        set_state(state)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise StateFault(f"{name} is not the state of a generator") from error


# -- which file -----------------------------------------------------------------------------------


def named_last(tag: Path) -> Path | None:
    """The file that Detectron2's text file `last_checkpoint` names; None where nothing was saved.

    Raises:
        UnreadableFile: `tag` holds no name.
        UserError: it names a file outside its folder.
    """
    if not tag.is_file():
        return None
    with open(tag, "rb") as file:
        name = file.read(4096).decode("utf-8", "replace").strip()
    if not name or not name.isprintable():
        raise UnreadableFile(f"{tag} is damaged: it names no checkpoint")
    path = tag.parent / name
    # A link is the user's own; only what the text says must stay within the folder.
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(tag.parent)):
        raise UserError(
            f"{tag} names {name[:120]}, which is outside of its folder: write the name of one of "
            "the folder's own checkpoints into it"
        )
    return path


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """By the number in their names; those without one, such as model_final, come first."""

    def number(path: Path) -> float:
        found = re.findall(r"\d+", path.name)
        return int(found[-1]) if found else math.inf

    return sorted(paths, key=number, reverse=True)


def newest_whole(
    last: Path, others: Iterable[Path], read: Callable[[Path], Content]
) -> tuple[Path, Content] | None:
    """The last checkpoint and its content or, where it is damaged, the newest of the others that is
    whole, with a warning. None where nothing was saved yet.

    Args:
        last: that checkpoint, or Detectron2's text file `last_checkpoint`, which names it.
        others: those beside it; it may be among them.
        read: raises UnreadableFile for a damaged one.

    Raises:
        UserError: none is whole, and why the last one is not; another fault than damage.
    """
    tag = last if last.name == "last_checkpoint" else None
    try:
        last = named_last(tag) if tag else last
        return None if last is None else (last, read(last))
    except UnreadableFile as found:
        error = found
    for path in newest_first(others):
        if path != last:
            with contextlib.suppress(UnreadableFile):
                content = read(path)
                print_on_main(f"warning: {error}; going on from {path}, the newest that is whole")
                return path, content
    raise UnreadableFile(f"{error}; no other checkpoint beside it is whole") from error
