"""Keys and modules that the plugin gives to Detectron2, with it and with a stand-in for it."""

import pytest
import torch
from tiny_voc import write_tiny_config
from torch import nn

from moco_det.common.errors import UserError
from moco_det.config import loading as native_config

DILATED = [
    "MODEL.RESNETS.OUT_FEATURES",
    "['res5']",
    "MODEL.RESNETS.RES5_DILATION",
    "2",
    "MODEL.BACKBONE.NAME",
    "build_resnet_dilated_c5_backbone",
]


@pytest.fixture
def load(plugin, tmp_path):
    """Function: KEY VALUE ... -> the tiny detector's config, as the plugin reads it."""
    path = str(write_tiny_config(tmp_path / "tiny.yaml", tmp_path / "nowhere"))
    return lambda *opts: plugin.extensions.load_config(path, opts)


def test_options_lie_over_the_file_and_the_file_over_the_defaults(load):
    cfg = load("SOLVER.BASE_LR", "0.5", "INPUT.RANDOM_SCALE", "[0.5, 2.0]")
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.MOMENTUM) == (0.5, 6, 0.9)
    assert list(cfg.INPUT.RANDOM_SCALE) == [0.5, 2.0]
    assert cfg.is_frozen()


def test_keys_of_our_own_are_added_with_our_defaults(load):
    cfg, defaults = load(), dict(native_config.leaves(native_config.get_cfg()))
    found = dict(native_config.leaves(cfg))
    for key in native_config.KEYS["own"]:
        assert found[key] == defaults[key]
    assert cfg.MODEL.DENSEPOSE_ON is False
    assert cfg.MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE == 112


def test_a_key_that_is_there_already_keeps_its_value(plugin, load):
    cfg = load().clone()
    cfg.defrost()
    cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS, cfg.MODEL.DENSEPOSE_ON = 3, True
    plugin.extensions.add_moco_config(cfg)
    assert (cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS, cfg.MODEL.DENSEPOSE_ON) == (3, True)


def test_cuda_is_asked_for_only_where_there_is_some(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load("MODEL.DEVICE", "cuda").MODEL.DEVICE == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load("MODEL.DEVICE", "cuda").MODEL.DEVICE == "cuda"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.BASELR", "1"), "unknown key SOLVER.BASELR; the nearest is SOLVER.BASE_LR"),
        (("SOLVER.BASE_LR", "fast"), "SOLVER.BASE_LR|Type mismatch"),
        (("SOLVER.BASE_LR", "float('nan')"), "config|SOLVER.BASE_LR"),
        (("SOLVER.MAX_ITER", "99999999999"), "SOLVER.MAX_ITER is 99999999999"),
    ],
)
def test_mistakes_are_named(load, opts, message):
    with pytest.raises(UserError, match=message):
        load(*opts)


def test_the_c4_head_ends_in_a_norm(plugin, load):
    cfg = load("MODEL.RESNETS.NORM", "BN", "MODEL.ROI_HEADS.NAME", "Res5ROIHeadsExtraNorm")
    res5, channels = plugin.extensions.Res5ROIHeadsExtraNorm._build_res5_block(cfg)
    assert channels == 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    assert list(dict(res5.named_children()))[-1] == "norm"
    assert (type(res5.norm), res5.norm.num_features) == (nn.BatchNorm2d, channels)
    other, _ = plugin.extensions.Res5ROIHeadsExtraNorm._build_res5_block(
        load("MODEL.RESNETS.NORM", "GN")
    )
    assert isinstance(other.norm, nn.GroupNorm)


@pytest.mark.parametrize(("norm", "kind"), [("SyncBN", nn.SyncBatchNorm), ("BN", nn.BatchNorm2d)])
def test_the_dilated_backbone(plugin, load, norm, kind):
    ShapeSpec = plugin.d2.layers.ShapeSpec
    cfg = load("MODEL.RESNETS.NORM", norm, *DILATED)
    backbone = plugin.extensions.build_resnet_dilated_c5_backbone(cfg, ShapeSpec(channels=3))
    assert backbone.output_shape() == {"c5": ShapeSpec(channels=512, stride=16)}
    assert type(backbone.reduce.norm) is kind
    assert backbone.reduce.in_channels == 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    with torch.no_grad():
        assert backbone.eval()(torch.rand(1, 3, 64, 96))["c5"].shape == (1, 512, 4, 6)
    with pytest.raises(UserError, match="RES5_DILATION is 1; .* needs 2"):
        plugin.extensions.build_resnet_dilated_c5_backbone(
            load(*DILATED, "MODEL.RESNETS.RES5_DILATION", "1"), ShapeSpec(channels=3)
        )


def test_the_semantic_head_of_a_config(plugin, load):
    """Every key arrives; losses in training, logits in evaluation, as Detectron2 wants them."""
    ShapeSpec = plugin.d2.layers.ShapeSpec
    options = """MODEL.SEM_SEG_HEAD.IN_FEATURES ['res5'] MODEL.SEM_SEG_HEAD.COMMON_STRIDE 8
    MODEL.SEM_SEG_HEAD.NUM_CLASSES 5 MODEL.SEM_SEG_HEAD.CONVS_DIM 12 MODEL.SEM_SEG_HEAD.NORM BN
    MODEL.SEM_SEG_HEAD.IGNORE_VALUE 99 MODEL.SEM_SEG_HEAD.LOSS_WEIGHT 0.25"""
    shapes = {"res4": ShapeSpec(channels=3, stride=16), "res5": ShapeSpec(channels=6, stride=8)}
    head = plugin.extensions.FCN16Head(load(*options.split()), shapes)
    convs = [head.conv1, head.conv2, head.predictor]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(6, 12), (12, 12), (12, 5)]
    assert [type(c.norm) for c in convs[:2]] == [nn.BatchNorm2d] * 2
    features = {"res5": torch.rand(2, 6, 3, 4), "res4": torch.rand(2, 3, 2, 2)}
    labels = torch.randint(5, (2, 20, 30))
    labels[:, :7] = 99
    for layer in (head.conv1, head.conv2):
        layer.norm.eval()
    nothing, losses = head(features, labels)
    logits, none = head.eval()(features)
    assert (nothing, none) == (None, {})
    assert logits.shape == (2, 5, 24, 32)
    expected = nn.functional.cross_entropy(logits[..., :20, :30], labels, ignore_index=99)
    assert losses["loss_sem_seg"].item() == pytest.approx(0.25 * expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("norm", "recorded", "next_draw"),
    [
        (
            "",
            [
                [-0.05157959461212158, -0.5739504098892212, -0.017186172306537628],
                [0.0693439170718193, 0.18793068826198578, 0.2979784309864044],
                [-0.020124882459640503, -0.008755650371313095, 0.01096084900200367],
            ],
            0.5958616733551025,
        ),
        (
            "SyncBN",
            [
                [-0.1891493946313858, -0.30527830123901367, -0.17681947350502014],
                [-0.262909859418869, 0.5165137052536011, 0.027285300195217133],
                [0.028572846204042435, -0.0012286023702472448, 0.02747693657875061],
            ],
            0.16196036338806152,
        ),
    ],
)
def test_initial_weights_of_a_seed(plugin, norm, recorded, next_draw):
    """Recorded when this head was Detectron2's alone; the native one draws in another order."""
    torch.manual_seed(0)
    options = {"in_feature": "res5", "in_channels": 3, "stride": 16, "num_classes": 2}
    norm = plugin.extensions.detectron2_norm(norm)
    head = plugin.extensions.FCN16Head(**options, channels=4, norm=norm)
    weights = [head.conv1.weight, head.conv2.weight, head.predictor.weight]
    assert [w.flatten()[:3].tolist() for w in weights] == [pytest.approx(x) for x in recorded]
    assert not head.predictor.bias.any()
    assert torch.rand(1).item() == pytest.approx(next_draw)
