"""What the plugin adds to Detectron2's registries: the native modules with Detectron2's norms."""

import pytest
import torch
from detector_configs import CONFIGS, RUNS
from torch import nn

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.config import get_cfg as detectron2_cfg
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import Backbone, build_backbone, build_model, build_sem_seg_head

from moco_det.native.modeling.backbones import DilatedC5 as NativeDilatedC5
from moco_det.native.modeling.semantic_head import FCN16Head as NativeFCN16Head


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
