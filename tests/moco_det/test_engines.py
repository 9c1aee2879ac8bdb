"""Which engine runs, and why."""

import importlib.util

import pytest

from moco_det import engines
from moco_det.common.errors import UserError
from moco_det.engines import choose_engine


def test_without_detectron2(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto") == ("native", "detectron2 is not installed")
    assert choose_engine("native") == ("native", "asked for")
    with pytest.raises(UserError, match="detectron2 is not installed; .* --engine native"):
        choose_engine("detectron2")


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="without Detectron2")
def test_with_detectron2():
    assert choose_engine("auto") == ("detectron2", "it is installed")
    assert choose_engine("detectron2") == ("detectron2", "asked for")
    assert choose_engine("native") == ("native", "asked for")
