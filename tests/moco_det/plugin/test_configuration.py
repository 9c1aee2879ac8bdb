"""Detectron2's config with the keys that this project adds."""

import pytest
from detector_configs import CONFIGS, RUNS
from tiny_voc import write_tiny_config, write_tiny_voc

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")


from moco_det.common.errors import UserError
from moco_det.config import loading as native_config
from moco_det.config.loading import leaves
from moco_det.plugin import load_config


@pytest.fixture
def tiny(tmp_path):
    """A config file and its data set, both tiny."""
    return str(write_tiny_config(tmp_path / "tiny.yaml", write_tiny_voc(tmp_path / "voc")))


@pytest.mark.parametrize("name", RUNS)
def test_both_engines_read_the_same_from_a_config(name):
    if "densepose" in name:
        pytest.importorskip("densepose")
    theirs = dict(leaves(load_config(str(CONFIGS / name))))
    ours = dict(
        leaves(native_config.on_available_device(native_config.load_config(str(CONFIGS / name))))
    )
    different = {k for k, v in ours.items() if repr(theirs[k]) != repr(v)}
    assert different == set()


def test_keys_of_our_own_have_our_defaults(tiny):
    cfg, defaults = dict(leaves(load_config(tiny))), dict(leaves(native_config.get_cfg()))
    for key in native_config.KEYS["own"]:
        assert cfg[key] == defaults[key]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASELR", "1"], "unknown key SOLVER.BASELR; the nearest is SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR|Type mismatch"),
        (["SOLVER.BASE_LR"], "config"),
    ],
)
def test_mistakes_in_a_config(tiny, opts, message):
    with pytest.raises(UserError, match=message):
        load_config(tiny, opts)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config("nowhere.yaml")
