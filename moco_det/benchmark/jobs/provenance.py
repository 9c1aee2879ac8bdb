"""What a number came from: code, packages, machine."""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "numpy", "fvcore", "pycocotools", "opencv-python-headless")
OPTIONAL = ("detectron2", "lvis", "cityscapesScripts")


def provenance(repository: Path) -> dict[str, dict[str, str]]:
    """{"code", "packages", "hardware"}: label -> text, for people and for run.json."""
    return {
        "code": {"moco_det": version("moco_det") or "not installed", "commit": commit(repository)},
        "packages": {"python": platform.python_version()} | packages(),
        "hardware": hardware(),
    }


def environment(repository: Path) -> dict[str, str]:
    """All of `provenance` as one list of label and text."""
    return {k: text for group in provenance(repository).values() for k, text in group.items()}


def packages() -> dict[str, str]:
    """Name -> version of what the numbers depend on, as far as it is installed."""
    versions = {name: version(name) for name in (*PACKAGES, *OPTIONAL)}
    return {name: found for name, found in versions.items() if found}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, str]:
    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": socket.gethostname(),
        "processor": f"{_processor()}, {cores} cores",
        "gpu": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "none",
        "system": platform.platform(),
    }


def commit(repository: Path) -> str:
    """The commit, with "-dirty" where files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
