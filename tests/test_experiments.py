"""Every experiment of configs/, narrowed: built, trained for a step, and run on two images.

Losses, gradients, the step and the predictions are held to what Detectron2 computes from the same
file: recorded, and live where it is installed.
"""

import numpy as np
import pytest
from record_experiments import experiments, record_experiment
from recording import read

from moco_det.config.loading import load_config
from moco_det.native.engine.inference import Probe

TOLERANCE = 1e-4  # of a product with a vector of ones and smaller, relative to the tensors' length
MASK_PIXELS = 8  # of some 10^4
PIXELS = ("detection masks", "detection charts")


@pytest.fixture(scope="module")
def golden():
    return read("experiments")


def assert_equal(found, expected):
    """Two results of `record_experiment`."""
    assert found.keys() == expected.keys()
    for name, (count, square, *products) in expected.items():
        assert found[name][0] == count, name
        length = max(np.sqrt(square), 1e-6)
        rel = MASK_PIXELS / length**2 if name in PIXELS else TOLERANCE
        assert np.sqrt(found[name][1]) == pytest.approx(length, rel=rel, abs=1e-6), name
        # Rounding decides on a few pixels of masks.
        allowed = MASK_PIXELS if name in PIXELS else TOLERANCE * length
        assert found[name][2:] == pytest.approx(products, abs=allowed), name


@pytest.mark.parametrize("name", experiments())
def test_native_engine_computes_what_detectron2_did(name, golden):
    assert_equal(record_experiment(name, Probe, load_config), golden[name])


@pytest.mark.parametrize("name", experiments())
def test_detectron2_computes_what_it_did(name, golden):
    plugin = pytest.importorskip("moco_det.plugin.probe")
    if "densepose" in name:
        pytest.importorskip("densepose")
    assert_equal(record_experiment(name, plugin.Probe, plugin.load_config), golden[name])


def test_every_part_of_a_detector_has_something_to_do(golden):
    """A recorded loss of 0, or no detection, would agree with anything."""
    for name, quantities in golden.items():
        if name != "detectron2":
            used = [
                k
                for k in quantities
                if k.startswith(("loss", "detection scores", "mask", "mean U", "key"))
            ]
            assert used or "FCN16" in name
            assert all(quantities[k][0] and quantities[k][1] > 0 for k in used), name


def test_every_experiment_is_recorded(golden):
    assert set(experiments()) == golden.keys() - {"detectron2"}
