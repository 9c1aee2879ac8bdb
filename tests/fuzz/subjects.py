"""What the classes of inputs have in common: commands, whole files, what is wrong with a result.

A subject has two functions, both run in children: `prepare(corpus)` writes whole files and what the
commands make of them, once; `attempt(rng, corpus, folder)` writes a changed file to `folder`, runs
commands on it, and returns a complaint, "" where all is well.
"""

import hashlib
import math
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from tests.fuzz.sandbox import Step, run_command

PRETRAIN = "pretrain/main.py"
MOCO = [
    "-a", "resnet50w0.25x", "--image-size", "32", "-b", "4", "--moco-k", "8", "--moco-dim", "8",
    "-j", "0", "--seed", "7", "-p", "1", "--knn-every", "0", "--epochs", "9", "--keep", "1",
]  # fmt: skip
LAST = "checkpoint_last.pth.tar"
TRAIN = "tools/train_net.py"
NATIVE = ("--engine", "native")
SHORT = ["SOLVER.CHECKPOINT_PERIOD", "0", "TEST.EVAL_PERIOD", "0", "TEST.PRECISE_BN.ENABLED",
         "False", "SOLVER.STEPS", "()"]  # fmt: skip


def write_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3))
                cv2.imwrite(str(folder / part / label / f"{i}.png"), pixels.astype(np.uint8))
    return folder


class Subject(NamedTuple):
    prepare: Callable[[Path], None]
    attempt: Callable[[random.Random, Path, Path], str]


def note(folder: Path, mutation: str) -> None:
    """Say what is changed, before a command can crash on it."""
    (folder / "mutation").write_text(mutation)


def command(folder: Path, script: str, *arguments: object, name: str = "") -> Step:
    """A command that must succeed. Raises RuntimeError where it does not."""
    step = run_command(folder, script, *arguments, name=name)
    if not step.accepted:
        raise RuntimeError(f"{script} has failed on whole files: {step.err[-2000:]}")
    return step


def odd_file(rng: random.Random, path: Path) -> str:
    """Put what is no regular file in the place of `path`; what it is."""
    path.unlink(missing_ok=True)
    kind = rng.choice(("a FIFO", "/dev/zero", "a folder", "a link to itself", "an empty file"))
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "an empty file":
        path.touch()
    else:
        path.symlink_to(path if kind == "a link to itself" else "/dev/zero")
    return kind


# -- what a command has made ----------------------------------------------------------------------


def digest(path: Path) -> str:
    """Of all tensors and numbers in a file of weights; "not finite" where one is not."""
    content = pickle.loads(path.read_bytes()) if path.suffix == ".pkl" else load(path)
    known, finite = hashlib.sha256(), True
    for name, value in sorted(_leaves(content), key=lambda leaf: leaf[0]):
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.array(value))
        if isinstance(value, torch.Tensor):
            finite &= bool(value.isfinite().all())
            known.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            known.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, int | float):
            finite &= math.isfinite(value)
            known.update(f"{name}{value}".encode())
    return known.hexdigest() if finite else "not finite"


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _leaves(tree: Any, prefix: str = ""):
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in pairs:
            if prefix or key != "config":
                yield from _leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, tree


def complaint(step: Step, must: str, result: Path | None = None, whole: Path | None = None) -> str:
    """What is wrong with a step, given what the input must lead to.

    Args:
        must: "refuse"; "same" result or refused; "accept"; or "any" result that is finite.
        result: the file of weights that the step has made, `whole` that of the whole input.
    """
    if not step.accepted:
        said = step.message or step.exception or step.out[-500:]
        return f"{step.name} refused what is whole: {said}" if must == "accept" else ""
    if must == "refuse":
        return f"{step.name} accepted it"
    if result is not None:
        found = digest(result)
        if found == "not finite":
            return f"{step.name} accepted it, and the result is not finite"
        if must in ("same", "accept") and whole and found != digest(whole):
            return f"{step.name} accepted it, and the result is not that of the whole file"
    return ""
