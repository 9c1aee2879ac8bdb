"""tools/check_parity.py on every run that is shipped, and on engines that do differ."""

import importlib.util

import pytest
import torch
from commands import load_command, python
from detector_configs import CONFIGS, RUNS

from moco_det.config.loading import leaves, load_config
from moco_det.native.engine.inference import Probe
from moco_det.native.modeling import keypoint_head, meta_arch

TOOL = "tools/check_parity.py"
# So that res5 on the regions of a C4 detector takes seconds, and 1230 masks of each region do.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "60",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
    "TEST.DETECTIONS_PER_IMAGE": "40",
}
OPTS = [text for pair in SMALL.items() for text in pair]
QUICKSTART = "quick/quickstart_R18_FPN.yaml"


def distinct_models(architecture):
    """One YAML for each model: of those that differ in schedule, data or weights, the first."""
    found = {}
    for name in RUNS:
        cfg = load_config(str(CONFIGS / name))
        model = [x for x in leaves(cfg.MODEL) if x[0] != "WEIGHTS"]
        if architecture == cfg.MODEL.META_ARCHITECTURE:
            found.setdefault(repr((model, cfg.INPUT.MASK_FORMAT)), name)
    return [
        pytest.param(name, marks=pytest.mark.slow if "supervised" in name else ())
        for name in found.values()
    ]


check_parity = load_command(TOOL)


def run(config, *flags):
    """The command's exit code; in this process, which has the engines imported already."""
    try:
        check_parity.main(["--config-file", str(CONFIGS / config), *flags, *OPTS])
    except SystemExit as stop:
        return stop.code
    return 0


def rows(printed):
    """Quantity -> number of values, of the printed table."""
    lines = [line.split() for line in printed.splitlines() if line.endswith("  ok")]
    return {" ".join(line[:-4]): int(line[-4]) for line in lines}


@pytest.fixture
def detectron2():
    pytest.importorskip("detectron2", reason="compares with Detectron2, which is not installed")


@pytest.mark.parametrize("config", distinct_models("GeneralizedRCNN"))
def test_engines_agree(config, detectron2, capsys):
    assert run(config) == 0
    printed = capsys.readouterr().out
    values = rows(printed)
    assert f"all {len(values)} quantities agree to 0.0001" in printed
    expected = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    cfg = load_config(str(CONFIGS / config))
    if cfg.MODEL.MASK_ON:
        expected |= {"loss_mask", "mask probabilities", "detection masks"}
    if cfg.MODEL.KEYPOINT_ON:
        expected |= {"loss_keypoint", "keypoint heatmaps", "detection keypoints", "keypoint scores"}
    assert expected < values.keys()
    for name in ("proposal", "detection"):
        assert values[f"{name} boxes"] == 4 * values[f"{name} scores"] > 20
    model = Probe(str(CONFIGS / config), OPTS).model
    assert values["parameters after a step"] == sum(p.numel() for p in model.parameters())
    gradients = [name for name in values if name.startswith("gradient of ")]
    assert len(gradients) == 2
    assert gradients[0].endswith("stem.conv1")
    assert sum(name.startswith("features") for name in values) == (5 if "FPN" in config else 1)


@pytest.mark.parametrize("config", distinct_models("SemanticSegmentor"))
def test_engines_agree_on_label_maps(config, detectron2, capsys):
    assert run(config) == 0
    printed = capsys.readouterr().out
    values = rows(printed)
    assert f"all {len(values)} quantities agree to 0.0001" in printed
    assert {"features res5", "pixel logits", "pixel scores", "loss_sem_seg"} < values.keys()
    assert values["pixel scores"] > 10**5
    gradients = [name.removeprefix("gradient of ") for name in values if "gradient" in name]
    assert gradients == ["backbone.stem.conv1", "sem_seg_head.predictor"]


def test_weights_from_a_file(detectron2, capsys, tmp_path):
    torch.manual_seed(3)
    model = Probe(str(CONFIGS / QUICKSTART), OPTS).model
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    assert run(QUICKSTART, "--weights", str(tmp_path / "backbone.pth")) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'backbone.pth'}: {len(backbone)} arrays loaded" in printed
    assert rows(printed)["detection scores"] > 10


class Perturbed(Probe):
    """The native engine with one weight of the last layer off by a thousandth of the largest."""

    def quantities(self, items, seed):
        weight = self.model.roi_heads.box_predictor.bbox_pred.weight
        weight.data[0, 0] += 1e-3 * weight.data.abs().max()
        return super().quantities(items, seed)


def test_a_perturbed_weight_is_found(detectron2, capsys, monkeypatch):
    monkeypatch.setattr(check_parity, "Probe", Perturbed)
    assert run(QUICKSTART) == 1
    captured = capsys.readouterr()
    assert "parameters after a step" in captured.err
    assert "features p2" not in captured.err
    assert "quantities differ by more than 0.0001 between the engines" in captured.err
    assert run(QUICKSTART, "--tolerance", "0.1") == 0


HEADS = """MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.KEYPOINT_ON True
MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,)"""


def test_masks_and_keypoints_elsewhere_on_the_image_are_found(detectron2, capsys, monkeypatch):
    assert run(QUICKSTART, *HEADS.split()) == 0
    paste, locate = meta_arch.paste_masks, keypoint_head.heatmaps_to_keypoints

    def paste_elsewhere(masks, boxes, size):
        return paste(masks, 0.99 * boxes, size)

    def locate_elsewhere(heatmaps, boxes):
        return locate(heatmaps, boxes + 0.5)

    monkeypatch.setattr(meta_arch, "paste_masks", paste_elsewhere)
    monkeypatch.setattr(keypoint_head, "heatmaps_to_keypoints", locate_elsewhere)
    capsys.readouterr()
    assert run(QUICKSTART, *HEADS.split()) == 1
    error = capsys.readouterr().err
    assert "between the engines: detection masks, detection keypoints" in error


def test_another_number_of_detections_is_found(detectron2, capsys, monkeypatch):
    class Fewer(Probe):
        def outputs(self, items):
            self.model.roi_heads.box_predictor.detections_per_image = 3
            return super().outputs(items)

    monkeypatch.setattr(check_parity, "Probe", Fewer)
    assert run(QUICKSTART) == 1
    assert "shape: (3, 4), not (" in capsys.readouterr().out


def test_without_detectron2(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "detectron2" else find_spec(name)
    )
    assert run(QUICKSTART) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: detectron2 is not installed")
    assert "native" in error


def test_detectron2_that_does_not_import(tmp_path):
    (tmp_path / "detectron2").mkdir()
    broken = "raise ImportError('_C.so: undefined symbol')\n"
    (tmp_path / "detectron2" / "__init__.py").write_text(broken)
    environment = {"PYTHONPATH": str(tmp_path)}
    done = python(TOOL, "--config-file", CONFIGS / QUICKSTART, environment=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "_C.so: undefined symbol" in error
    assert "native" in error


@pytest.mark.parametrize(
    "flags",
    [("--image-size", "32", "96"), ("--images", "0"), ("--images", "-1"), ("--images", str(2**62))],
)
def test_nothing_to_compare_on(flags, capsys):
    assert run(QUICKSTART, *flags) == 1
    assert "at least one image, and 64 pixels" in capsys.readouterr().err


def test_missing_config(detectron2, capsys):
    assert run("no_such.yaml") == 1
    assert "no_such.yaml" in capsys.readouterr().err
