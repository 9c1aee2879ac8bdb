"""Loading weights into detectors: every name finds its place, or the user hears of it."""

from itertools import product

import pytest
import torch
import torchvision
from foreign_checkpoints import RECORDED, arrays_of, write_foreign
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.resnets import Architecture
from moco_det.common.weight_layouts import FIELDS, NAMES, rename
from moco_det.config.loading import get_cfg
from moco_det.native.engine.trainer import load_initial_weights
from moco_det.native.modeling.backbones import ResNet
from moco_det.native.modeling.meta_arch import build_model
from moco_det.weights import files
from moco_det.weights.files import load_backbone_weights, write_weights

STAGES = ["res2", "res3", "res4", "res5"]


def resnet(depth=18, norm="BN", stages=STAGES):
    network = ResNet(
        depth,
        out_features=stages,
        norm=norm,
        freeze_at=0,
        res2_channels=64 if depth < 50 else 256,
    )
    for value in network.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return network


class C4(nn.Module):
    """The names of Detectron2's C4 detectors: res5 is part of the heads, with a norm after it."""

    def __init__(self):
        super().__init__()
        self.backbone = resnet(stages=["res4"])
        self.roi_heads = nn.Module()
        self.roi_heads.res5 = resnet().res5
        self.roi_heads.res5.norm = nn.BatchNorm2d(512)
        self.roi_heads.box_predictor = nn.Linear(512, 5)


class FPN(nn.Module):
    """The names of Detectron2's FPN detectors."""

    def __init__(self, depth=18, norm="BN", classes=4):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = resnet(depth, norm)
        self.backbone.fpn_lateral2 = nn.Conv2d(64, 8, 1)
        self.roi_heads = nn.Module()
        self.roi_heads.box_predictor = nn.Linear(8, classes + 1)


@pytest.fixture
def weight_file(tmp_path):
    """Function: arrays, metadata -> path of a Detectron2 file that holds them."""

    def write(arrays, **metadata):
        path = tmp_path / "weights.pkl"
        content = {"model": dict(arrays), "__author__": "MOCO", "matching_heuristics": True}
        write_weights(path, content | metadata)
        return path

    return write


def test_backbone_into_fpn_detector(weight_file):
    source, model = resnet(), FPN()
    head = model.roi_heads.box_predictor.weight.clone()
    report = load_backbone_weights(model, weight_file(source.state_dict()))
    for name, value in source.state_dict().items():
        assert torch.equal(model.backbone.bottom_up.state_dict()[name], value), name
    assert torch.equal(model.roi_heads.box_predictor.weight, head)
    heads = ("backbone.fpn_lateral2", "roi_heads.box_predictor")
    assert report.missing == tuple(f"{h}.{kind}" for h in heads for kind in ("weight", "bias"))
    assert report.unexpected == report.skipped == ()
    assert len(report.loaded) == len(source.state_dict())


def test_backbone_into_c4_detector(weight_file):
    source, model = resnet(), C4()
    norm = model.roi_heads.res5.norm.state_dict()
    report = load_backbone_weights(model, weight_file(source.state_dict()))
    for name, value in source.state_dict().items():
        part = model.roi_heads if name.startswith("res5.") else model.backbone
        assert torch.equal(part.state_dict()[name], value), name
    assert "roi_heads.res5.norm.weight" in report.missing  # new in MoCo's detectors
    assert torch.equal(model.roi_heads.res5.norm.weight, norm["weight"])


def test_detectors_of_the_native_engine(weight_file, capsys):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeadsExtraNorm"
    cfg.MODEL.RESNETS.NORM = "BN"
    path = weight_file(resnet(50).state_dict() | {"stem.fc.weight": torch.ones(1)})
    report = load_backbone_weights(build_model(cfg), path)
    assert report.unexpected == ("stem.fc.weight",)
    started = {name.split(".")[1] for name in report.missing}
    assert started == {"rpn_head", "res5", "box_predictor"}
    assert all(n.startswith("roi_heads.res5.norm.") for n in report.missing if ".res5." in n)
    printed = capsys.readouterr().out
    assert "weights.pkl: 318 arrays loaded" in printed
    assert "1 unused: stem.fc" in printed


@pytest.mark.parametrize("kind", ["weight", "running_var"])
def test_backbone_array_left_at_random_is_an_error(weight_file, kind):
    arrays = resnet().state_dict()
    del arrays[f"res3.0.conv1.norm.{kind}"]
    path, model = weight_file(arrays), FPN()
    before = model.backbone.bottom_up.stem.conv1.weight.clone()
    with pytest.raises(UserError, match=rf"weights\.pkl .*: .*res3\.0\.conv1\.norm\.{kind};"):
        load_backbone_weights(model, path)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, before)
    report = load_backbone_weights(model, path, allow_missing=True)
    assert f"backbone.bottom_up.res3.0.conv1.norm.{kind}" in report.missing
    assert not torch.equal(model.backbone.bottom_up.stem.conv1.weight, before)


def test_batch_counter_may_be_missing(weight_file):
    arrays = {k: v for k, v in resnet().state_dict().items() if "num_batches" not in k}
    report = load_backbone_weights(FPN(), weight_file(arrays))
    assert not any("num_batches" in name for name in report.missing)


def test_names_of_no_detector(weight_file):
    path = weight_file({"patch_embed.weight": torch.ones(1)})
    message = (
        r"backbone\.bottom_up\.stem\.conv1\.weight.* and 97 more; its names \(patch_embed\.weight, "
        r"\.\.\.\) are not those of a known kind of file: .*MoCo, .*SimSiam, "
    )
    with pytest.raises(UserError, match=message):
        load_backbone_weights(FPN(), path)


# The ResNet-34 file holds every array that a ResNet-18 asks for, in the right shape.
@pytest.mark.parametrize(("held", "wanted"), [(50, 18), (18, 50), (34, 18)])
def test_another_depth_is_said_so(weight_file, held, wanted):
    path = weight_file(resnet(held).state_dict())
    message = rf"holds a ResNet-{held}, the config asks for a ResNet-{wanted} .*DEPTH {wanted}"
    with pytest.raises(UserError, match=message):
        load_backbone_weights(FPN(wanted), path)


def test_wrong_shape_in_the_backbone_names_the_key(weight_file):
    path = weight_file(resnet().state_dict() | {"stem.conv1.weight": torch.ones(64, 3, 3, 3)})
    message = r"stem\.conv1\.weight has the shape \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"
    with pytest.raises(UserError, match=message):
        load_backbone_weights(FPN(), path)


def test_whole_detector(weight_file):
    source, model = FPN(), FPN()
    path = weight_file(source.state_dict(), matching_heuristics=False)
    report = load_backbone_weights(model, path)
    assert report.missing == report.unexpected == report.skipped == ()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_detector_saved_while_data_parallel(weight_file):
    source, model = FPN(), FPN()
    path = weight_file({f"module.{k}": v for k, v in source.state_dict().items()})
    assert load_backbone_weights(model, path).missing == ()


def test_predictor_of_other_classes_is_skipped_with_a_line(weight_file, capsys):
    source, model = FPN(classes=20), FPN(classes=4)
    head = model.roi_heads.box_predictor.weight.clone()
    report = load_backbone_weights(model, weight_file(source.state_dict()))
    line = "roi_heads.box_predictor.weight has the shape (21, 8), not (5, 8)"
    assert line in report.skipped
    assert f"not loaded: {line}" in capsys.readouterr().out.splitlines()
    assert torch.equal(model.roi_heads.box_predictor.weight, head)
    assert torch.equal(model.backbone.fpn_lateral2.weight, source.backbone.fpn_lateral2.weight)


@pytest.mark.parametrize("name", ["MoCo", "torchvision", "DenseCL", "lightly MoCo", "VISSL"])
def test_a_checkpoint_of_any_layout_is_loaded_as_it_is(tmp_path, capsys, name):
    """As the file that tools/convert_to_d2.py makes of it: the same arrays, the same needs."""
    encoder = torchvision.models.resnet18(num_classes=8)
    for value in encoder.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    path = write_foreign(tmp_path / "a.pth", name, encoder)
    model = FPN()
    if RECORDED[name]["beside"] and "arch" in RECORDED[name]["beside"]:
        content = torch.load(path, weights_only=False)
        torch.save(content | {"arch": "resnet18"}, path)
    report = load_backbone_weights(model, path)
    expected = rename(arrays_of(encoder), "torchvision", "detectron2")
    loaded = model.backbone.bottom_up.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert report.metadata["requires"] == Architecture(18).config()
    assert f"a.pth: {RECORDED[name]['title']}, ResNet-18" in capsys.readouterr().out


def test_needs_of_a_checkpoint_are_compared_with_the_config(tmp_path):
    """A converted file's entry "requires" does the same."""
    state = torchvision.models.resnet50().state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}},
               tmp_path / "a.pth.tar")  # fmt: skip
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = str(tmp_path / "a.pth.tar")
    cfg.MODEL.RESNETS.NORM = "BN"
    model = build_model(cfg)
    with pytest.raises(UserError, match=r"need INPUT\.FORMAT RGB .*STRIDE_IN_1X1 False"):
        load_initial_weights(cfg, model)
    for key, value in Architecture(50).config().items():
        cfg.merge_from_list([key, value])
    load_initial_weights(cfg, model)
    assert torch.equal(model.backbone.stem.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("prefix", ["module.encoder_q.", ""])
def test_a_checkpoint_that_lacks_arrays_names_them(tmp_path, prefix):
    state = torchvision.models.resnet18().state_dict()
    del state["layer2.0.conv1.weight"]
    state = {f"{prefix}{k}": v for k, v in state.items() if not k.startswith("fc.")}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    message = r"a\.pth: not a whole ResNet-18: layer2\.0\.conv1\.weight is missing"
    with pytest.raises(UserError, match=message):
        load_backbone_weights(FPN(), tmp_path / "a.pth")


def test_one_array_for_two_places(weight_file):
    path = weight_file(resnet().state_dict() | {"weight": torch.ones(1)})
    with pytest.raises(UserError, match="weight fits several arrays"):
        load_backbone_weights(FPN(), path)


def caffe2_arrays(network, norms):
    """The arrays of `network` under Caffe2's names; `norms` spells the kinds that a norm has."""
    arrays = {}
    places = product(FIELDS["s"], FIELDS["b"], FIELDS["c"], norms.items())
    for (_, stage, _), (_, block, _), (_, conv, letter), (kind, short) in places:
        for _, detectron2, caffe2 in NAMES:
            name = detectron2.format(s=stage, b=block, c=conv, n=kind)
            if name in network:
                old = caffe2.format(s=stage, b=block, c=letter, n=short)
                arrays[old] = network[name]
    return arrays


def test_caffe2_file_with_folded_statistics(weight_file):
    source = resnet().state_dict()
    arrays = caffe2_arrays(source, {"weight": "s", "bias": "b"}) | {"fc1000_b": torch.ones(1)}
    assert "res2_0_branch2a_bn_s" in arrays
    path = weight_file(arrays, __author__="Caffe2")
    model = FPN(norm="FrozenBN")
    report = load_backbone_weights(model, path)
    assert report.unexpected == ("fc1000_b",)
    loaded = model.backbone.bottom_up.state_dict()
    for name, value in loaded.items():
        if name.endswith("running_mean"):
            assert torch.equal(value, torch.zeros_like(value))
        elif name.endswith("running_var"):
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert torch.equal(value, source[name]), name
    with pytest.raises(UserError, match=r"MODEL\.RESNETS\.NORM FrozenBN"):
        load_backbone_weights(FPN(norm="BN"), path)


def test_caffe2_file_with_statistics(weight_file):
    source = resnet().state_dict()
    spelling = {"weight": "gamma", "bias": "beta"}
    spelling |= {kind: kind for kind in ("running_mean", "running_var")}
    model = FPN(norm="BN")
    load_backbone_weights(model, weight_file(caffe2_arrays(source, spelling)))
    for name, value in model.backbone.bottom_up.state_dict().items():
        assert "num_batches" in name or torch.equal(value, source[name]), name


@pytest.mark.parametrize("kind", ["moco", "caffe2", "detector"])
def test_same_result_as_detectron2s_checkpointer(weight_file, kind):
    """Detectron2's loader and this one leave the same arrays in the same model."""
    checkpoint = pytest.importorskip("detectron2.checkpoint")
    from detectron2.layers import FrozenBatchNorm2d

    ours, theirs = FPN(), FPN()
    ours = FrozenBatchNorm2d.convert_frozen_batchnorm(ours)
    theirs = FrozenBatchNorm2d.convert_frozen_batchnorm(theirs)
    theirs.load_state_dict(ours.state_dict())  # the same heads
    source = resnet().state_dict()
    if kind == "moco":
        path = weight_file(source | {"stem.fc.weight": torch.ones(2)})
    elif kind == "caffe2":
        arrays = caffe2_arrays(source, {"weight": "s", "bias": "b"})
        path = weight_file(arrays, __author__="Caffe2")
    else:
        path = weight_file(FPN(classes=20).state_dict())
    load_backbone_weights(ours, path)
    checkpoint.DetectionCheckpointer(theirs).load(str(path))
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_longest_end_of_a_name_is_taken():
    """As Detectron2's heuristics do: a more special name in the file wins over a general one."""
    wanted = ("backbone.stem.weight", "head.stem.weight", "other.weight")
    found = files._match(wanted, ("stem.weight", "head.stem.weight", "unused.weight"))
    assert found == {
        "backbone.stem.weight": "stem.weight",
        "head.stem.weight": "head.stem.weight",
    }
