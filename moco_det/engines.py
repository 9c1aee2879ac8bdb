"""Which engine runs: Detectron2 where it can be imported, else the native one."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from moco_det.common.errors import UserError

if TYPE_CHECKING:  # the names of the engines are asked for before torch is imported
    from moco_det.parity.probe import EngineProbe

ENGINES = ("auto", "native", "detectron2")


def choose_engine(wanted: str) -> tuple[str, str]:
    """One of ENGINES -> ("native" or "detectron2", the reason in a few words).

    Raises:
        UserError: "detectron2" is asked for and cannot be had; the message says why.
    """
    if wanted == "native":
        return "native", "asked for"
    if wanted == "detectron2":
        require_detectron2()
        return "detectron2", "asked for"
    problem = detectron2_problem()
    return ("native", problem) if problem else ("detectron2", "it is installed")


def require_detectron2() -> None:
    """UserError, with the reason, where the plugin cannot be imported."""
    problem = detectron2_problem()
    if problem:
        raise UserError(f"{problem}; the native engine needs no detectron2: --engine native")


def detectron2_problem() -> str | None:
    """None where `moco_det.plugin` can be imported, else why not, in the error's own words."""
    if importlib.util.find_spec("detectron2") is None:
        return "detectron2 is not installed"
    try:
        # By name: no other shared module may depend on an engine, and this one only on demand.
        importlib.import_module("moco_det.plugin")
    except Exception as error:  # a compiled part of another torch fails in many ways
        words = " ".join(str(error).split())
        return f"detectron2 is installed but cannot be imported ({type(error).__name__}: {words})"
    return None


def probe_class(engine: str) -> "type[EngineProbe]":
    """The `Probe` of the "native" or the "detectron2" engine."""
    module = {"native": "native.engine.inference", "detectron2": "plugin.probe"}[engine]
    return importlib.import_module(f"moco_det.{module}").Probe
