"""Frames and choices of scales as Detectron2's augmentations, with it and with a stand-in."""

import numpy as np
import pytest
import torch
from record_inputs import NumpyDraws
from tiny_nyud import SIZE, write_tiny_nyud

from moco_det.config.loading import get_cfg
from moco_det.datasets import get_dataset
from moco_det.native.data.mapper import build_test_mapper, build_train_mapper

FRAME = {"FIXED_SIZE": (40, 72), "RANDOM_SCALE": (0.75, 1.25), "RANDOM_ROTATION": 5.0}
INPUTS = {
    "frames": ("SemanticSegmentor", FRAME),
    "frames of depths": ("DepthEstimator", FRAME),
    "zooms": ("DepthEstimator", {"FIXED_SIZE": (40, 72), "SCALE_CHOICES": (1.0, 1.2, 1.5)}),
    "scales": ("SemanticSegmentor", {"SCALE_CHOICES": (0.5, 1.0, 2.0), "CROP": [40, 56]}),
}


def make_cfg(architecture, inputs):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 40
    for key, value in inputs.items():
        if key == "CROP":
            cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE, cfg.INPUT.CROP.TYPE = (
                True,
                value,
                "absolute",
            )
        else:
            cfg.INPUT[key] = value
    return cfg


@pytest.mark.parametrize("kind", INPUTS)
def test_both_engines_draw_the_same_inputs(plugin, tmp_path, kind):
    """From one state of numpy's global generator, image after image, to the last bit."""
    if kind == "scales" and not plugin.real:
        pytest.skip("the stand-in crops by other draws")
    architecture, inputs = INPUTS[kind]
    target = "depth" if architecture == "DepthEstimator" else "sem_seg"
    root = write_tiny_nyud(tmp_path / "nyud")
    records = get_dataset(f"nyud_{target}:{root}:train").records() * 4
    cfg = make_cfg(architecture, inputs)
    ours, theirs = build_train_mapper(cfg), plugin.pixel_data.build_pixel_mapper(cfg)
    np.random.seed(0)
    expected = [theirs(record) for record in records]
    np.random.seed(0)
    found = [ours(record, NumpyDraws()) for record in records]
    for item, other in zip(found, expected, strict=True):
        assert item["image"].dtype == other["image"].dtype
        assert torch.equal(item["image"], other["image"])
        assert item[target].dtype == other[target].dtype
        assert torch.equal(item[target], other[target])
    assert len({item["image"].float().sum().item() for item in found}) > 6  # they differ


def test_test_images_are_of_the_frames_size(plugin, tmp_path):
    if not plugin.real:
        pytest.skip("the stand-in's mapper maps nothing")
    name = f"nyud_depth:{write_tiny_nyud(tmp_path / 'nyud')}:train"
    plugin.data.register_datasets([name])
    cfg = make_cfg("DepthEstimator", FRAME)
    cfg.DATALOADER.NUM_WORKERS = 0
    record = get_dataset(name).records()[0]
    (item,) = next(iter(plugin.pixel_data.build_semantic_test_loader(cfg, name)))
    expected = build_test_mapper(cfg)(record, None)
    assert torch.equal(item["image"], expected["image"])
    assert (item["height"], item["width"]) == SIZE


def test_test_images_are_asked_for_in_the_frames_size(plugin, monkeypatch):
    if plugin.real:
        pytest.skip("looks into the stand-in's mapper")
    monkeypatch.setattr(
        plugin.pixel_data.DatasetCatalog, "get", lambda name: [{"sem_seg_file_name": 1}]
    )
    for inputs in (FRAME, {}):
        cfg = make_cfg("DepthEstimator", inputs)
        mapper = plugin.pixel_data.build_semantic_test_loader(cfg, "x").kwargs["mapper"]
        sizes = [augmentation.args[0] for augmentation in mapper.kwargs.get("augmentations", ())]
        assert sizes == ([(40, 72)] if inputs else [])
