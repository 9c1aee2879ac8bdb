"""All benchmarks one after the other, within minutes, to a JSON file and a page of Markdown.

Each is a command of its own, `tools/benchmark.py NAME ...`, in a process of its own: what one
leaves on the device is gone before the next, and one that fails does not end the others.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from moco_det.benchmark.jobs.job import provenance
from moco_det.benchmark.synthetic.images import CLASSES, draw_close_up, write_jpeg
from moco_det.common.files import write_json, write_text
from moco_det.common.installation import own_file

PHOTOGRAPHS = 100
PHOTOGRAPH_SIZE = 500, 375  # pixels, as ImageNet's are on average
DETECTORS = (
    "voc_R50_C4_24k_moco",
    "coco_R50_FPN_1x_moco",
    "coco_R50_FPN_keypoint_2x_moco",
    "voc_R50_DC5_24k_moco",
)


@dataclass(frozen=True)
class Measured:
    """What a command printed; `tables`: its tables' rows, column -> cell. `problem`: why not."""

    command: list[str]
    seconds: float
    lines: list[str]
    tables: list[list[dict[str, str]]]
    problem: str = ""


def commands(device: str, images: Path, versus: str) -> list[list[str]]:
    """The arguments of tools/benchmark.py: at the size of the papers on a GPU, of a try on a CPU.

    The questions that are asked most come first, as the time may end before the last.

    Args:
        images: photographs for the data path.
        versus: the engine beside the native one.
    """
    gpu = device == "cuda"
    step = ["--batch-size", "256", "--amp", "none", "fp16", "bf16", "--bn-groups", "1", "2", "8"]
    step += ["--compile", "off", "on", "--deterministic"]
    small = ["--arch", "resnet18", "--batch-size", "16", "--image-size", "96"]
    small += ["--amp", "none", "--rounds", "3"]
    found = [["pretrain-step", *(step if gpu else small), "--device", device]]
    step = ["--batch-size", "256", "--amp", "bf16"]
    small = ["--arch", "resnet18", "--batch-size", "8", "--rounds", "3"]
    found.append(["crops", *(step if gpu else small), "--device", device])
    size = "--image-size 800 1216 --batch-size 2 16" if gpu else "--image-size 96 128 --amp none"
    for name in DETECTORS if gpu else DETECTORS[1:2]:
        config = ["--config-file", f"configs/{name}.yaml", "--versus", versus]
        found.append(
            ["detector-step", *config, *size.split(), "--device", device, "MODEL.WEIGHTS", ""]
        )
    mask = ["--config-file", f"configs/{DETECTORS[1]}.yaml", "--versus", versus]
    some = ["--images", "100" if gpu else "2", "--device", device]
    found.append(["evaluation", *mask, *some])
    found.append(["data-path", "--images", str(images), "--device", device, "--rounds", "3"])
    found.append(["knn-bank", "--images", str(10**6 if gpu else 20_000), "--device", device])
    found.append(["annotation-memory", "--processes", "8" if gpu else "2"])
    if gpu:
        found.append(["pretrain-cost", "--device", device, "--amp", "bf16"])
    return found


def measure_all(todo: Sequence[list[str]], minutes: float) -> list[Measured]:
    """Run the commands in turn, as far as the time goes; the others say so."""
    end = time.monotonic() + 60 * minutes
    measured = []
    for arguments in todo:
        print(f"benchmark.py {' '.join(arguments)}", flush=True)
        found = _measure(arguments, end - time.monotonic())
        print("\n".join(found.lines or [found.problem]), flush=True)
        measured.append(found)
    return measured


def _measure(arguments: list[str], seconds: float) -> Measured:
    if seconds <= 0:
        return Measured(arguments, 0.0, [], [], "not run: the time is over")
    begun, problem = time.monotonic(), ""
    command = [sys.executable, str(own_file("tools/benchmark.py")), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        output = done.stdout
        if done.returncode:
            problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as ended:
        output = (ended.stdout or b"").decode()
        problem = "not finished: the time is over"
    lines = output.splitlines()
    return Measured(arguments, time.monotonic() - begun, lines, tables_in(lines), problem)


def tables_in(lines: Sequence[str]) -> list[list[dict[str, str]]]:
    """The rows of the Markdown tables among printed lines, column -> cell."""
    tables: list[list[dict[str, str]]] = []
    columns: list[str] | None = None
    for line in lines:
        if not line.startswith("|"):
            columns = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if columns is None:
            columns = cells
            tables.append([])
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            tables[-1].append(dict(zip(columns, cells, strict=True)))
    return tables


def write_measured(measured: Sequence[Measured], machine: str, output: Path) -> Path:
    """benchmark.json and benchmark.md in `output`; returns the path of the latter."""
    about = provenance()
    content = {"machine": machine, **about, "measured": [asdict(found) for found in measured]}
    write_json(output / "benchmark.json", content)
    commit = about["code"]["commit"]
    parts = [f"# Benchmarks\n\n{machine}, commit {commit}"]
    for found in measured:
        words = " ".join(word or '""' for word in found.command)
        parts.append(f"## `benchmark.py {words}`")
        parts.append(_markdown(found.lines) or "(nothing)")
        parts.append(f"{found.seconds:.0f} seconds{f'; **{found.problem}**' * bool(found.problem)}")
    write_text(output / "benchmark.md", "\n\n".join(parts) + "\n")
    return output / "benchmark.md"


def _markdown(lines: Sequence[str]) -> str:
    """Tables as they are; other lines, one below the other, as they were printed."""
    text = ""
    for line, before in zip(lines, ["", *lines], strict=False):
        apart = line.startswith("|") != before.startswith("|")
        text += ("\n" if apart else "") + (line if line.startswith("|") else f"    {line}") + "\n"
    return text.strip("\n")


def draw_photographs(folder: Path) -> Path:
    """JPEGs of the size of photographs, for those who pass none of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PHOTOGRAPHS):
        square = draw_close_up(np.random.default_rng(number), number % len(CLASSES), 375)
        write_jpeg(folder / f"{number:03d}.jpg", cv2.resize(square, PHOTOGRAPH_SIZE))
    return folder
