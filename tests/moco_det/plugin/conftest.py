"""The plugin, with Detectron2 where it is installed, and with a stand-in anywhere."""

import importlib
from types import SimpleNamespace

import pytest
from detectron2_stand_in import detectron2


@pytest.fixture(scope="module", params=["stand-in", "detectron2"])
def plugin(request):
    """Its modules, and Detectron2's that they are written against as `d2`."""
    real = request.param == "detectron2"
    if real:
        pytest.importorskip("detectron2", reason="also with Detectron2, which is not installed")
    with detectron2(real):
        ours = ("extensions", "frames", "data", "pixel_data", "trainer", "probe")
        theirs = ("layers", "data", "structures", "evaluation", "engine", "utils.events")
        yield SimpleNamespace(
            **{name: importlib.import_module(f"moco_det.plugin.{name}") for name in ours},
            d2=SimpleNamespace(
                **{
                    name.rpartition(".")[2]: importlib.import_module(f"detectron2.{name}")
                    for name in theirs
                }
            ),
            real=real,
        )
