"""What the plugin adds to Detectron2: keys of a config; native modules with Detectron2's norms."""

import pytest
import torch
from detector_configs import CONFIGS, RUNS
from tiny_voc import write_tiny_config, write_tiny_voc
from torch import nn

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.config import get_cfg as detectron2_cfg
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import Backbone, build_backbone, build_model, build_sem_seg_head

from moco_det.common.errors import UserError
from moco_det.config import loading as native_config
from moco_det.config.loading import leaves
from moco_det.native.modeling.backbones import DilatedC5 as NativeDilatedC5
from moco_det.native.modeling.semantic_head import FCN16Head as NativeFCN16Head
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
        (["SOLVER.BASE_LR", "x" * 5000], "^.{1,290}$"),
        (["x" * 5000, "1"], "^config .{1,280}; the nearest is [A-Z_.]+$"),
    ],
)
def test_mistakes_in_a_config(tiny, opts, message):
    with pytest.raises(UserError, match=message):
        load_config(tiny, opts)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {BASE_LR: .nan}\n", "SOLVER.BASE_LR is nan"),
        ("SOLVER: {MAX_ITER: 99999999999}\n", "SOLVER.MAX_ITER is 99999999999"),
        ("SEED: !!python/object/apply:pathlib.Path.touch [ran]\n", "is not supported"),
        ("_BASE_: other.yaml\n", "is not supported"),
        ("&x\nSEED: *x\n", "contains itself"),
    ],
)
def test_a_config_is_read_as_in_the_native_engine(tmp_path, monkeypatch, text, message):
    """Detectron2 itself would run what a YAML asks Python to run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("SEED: !!python/object/apply:os.mkdir [ran]\n")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_plain_detectron2_script_reads_every_config():
    """Without the keys that the plugin adds: a user's own train_net.py has none of them.

    All but semantic segmentation, whose INPUT.RANDOM_SCALE Detectron2 cannot honour by itself, and
    dense pose, whose keys only the DensePose project has.
    """
    for name in RUNS:
        if "FCN16" in name or "densepose" in name:
            continue
        cfg = detectron2_cfg()
        cfg.merge_from_file(str(CONFIGS / name))
        cfg.MODEL.DEVICE = "cpu"
        if name == "voc_R50_C4_24k_moco.yaml":
            assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
            assert "roi_heads.res5.norm.weight" in build_model(cfg).state_dict()


def dilated_c5(norm):
    cfg = detectron2_cfg()
    cfg.merge_from_file(str(CONFIGS / "voc_R50_DC5_24k_moco.yaml"))
    cfg.MODEL.RESNETS.NORM = norm
    return build_backbone(cfg)


@pytest.mark.parametrize("norm", ["SyncBN", "FrozenBN", "LN", ""])
def test_dilated_c5_is_one_of_detectron2_s_backbones(norm):
    backbone = dilated_c5(norm)
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone, NativeDilatedC5)
    assert backbone.output_shape() == {"c5": ShapeSpec(channels=512, stride=16)}
    assert (backbone.size_divisibility, backbone.padding_constraints) == (1, {})
    assert type(backbone.reduce.norm) is type(get_norm(norm, 512))
    assert (backbone.reduce.bias is None) == bool(norm)


def test_the_semantic_head_is_built_from_a_config_of_detectron2():
    cfg = detectron2_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NAME = "FCN16Head"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5"]
    cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 16
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32  # GroupNorm's 32 groups
    shape = {"res4": ShapeSpec(channels=4, stride=16), "res5": ShapeSpec(channels=8, stride=16)}
    head = build_sem_seg_head(cfg, shape)
    assert isinstance(head, NativeFCN16Head)
    assert [type(conv.norm) for conv in (head.conv1, head.conv2)] == [nn.GroupNorm] * 2
    features = {"res5": torch.rand(1, 8, 2, 3)}
    labels = torch.zeros(1, 32, 48, dtype=torch.int64)
    nothing, losses = head(features, labels)
    assert nothing is None
    logits, none = head.eval()(features)
    assert (tuple(logits.shape), none) == ((1, 54, 32, 48), {})
    assert losses.keys() == {"loss_sem_seg"}
    torch.testing.assert_close(losses["loss_sem_seg"], nn.functional.cross_entropy(logits, labels))
