"""Dense pose through Detectron2: with its DensePose project, and without it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from densepose_symmetries import write_symmetries
from paths import CONFIGS
from tiny_densepose import BOX, write_tiny_densepose

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from moco_det.common.errors import UserError
from moco_det.densepose.body import file_path, load_symmetries
from moco_det.densepose.points import decode_iuv
from moco_det.evaluation.predictions import prediction_record
from moco_det.native.data.mapper import DatasetMapper
from moco_det.native.data.transforms import Augmentation
from moco_det.plugin import load_config
from moco_det.plugin.data import fields_of, register_datasets
from moco_det.plugin.trainer import Trainer

CONFIG = CONFIGS / "quick" / "densepose_mini_R18_FPN.yaml"
TINY = """
MODEL.DEVICE cpu MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.FPN.OUT_CHANNELS 16
MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM 8
MODEL.ROI_DENSEPOSE_HEAD.NUM_STACKED_CONVS 1 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 1 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
TEST.DETECTIONS_PER_IMAGE 3
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return write_tiny_densepose(tmp_path / "tiny")


@pytest.fixture
def cfg(data, tmp_path):
    pytest.importorskip("densepose", reason="needs the DensePose project")
    options = ["DATASETS.TRAIN", f"('{data}',)", "DATASETS.TEST", f"('{data}',)"]
    options += ["INPUT.RANDOM_FLIP", "horizontal", "OUTPUT_DIR", str(tmp_path)]
    return load_config(str(CONFIG), TINY.split() + options)


def test_without_the_project(monkeypatch):
    monkeypatch.setitem(sys.modules, "densepose", None)
    with pytest.raises(UserError, match="DENSEPOSE_ON True needs Detectron2's DensePose project"):
        load_config(str(CONFIG))
    assert load_config(str(CONFIG), ["MODEL.DENSEPOSE_ON", "False"]).MODEL.DENSEPOSE_ON is False


def test_a_set_is_registered(data, tmp_path):
    register_datasets([data, data])
    annotated, bare = DatasetCatalog.get(data)
    assert len(annotated["annotations"][0]["dp_x"]) == 20
    assert "dp_x" not in bare["annotations"][0]
    metadata = MetadataCatalog.get(data)
    assert (metadata.thing_classes, metadata.evaluator_type) == (["person"], "densepose")
    assert Path(metadata.densepose_transform_src).is_relative_to(tmp_path)


def test_training_needs_the_symmetries(cfg, data):
    register_datasets([data])
    with pytest.raises(UserError, match="UV_symmetry_transforms.mat"):
        Trainer.build_train_loader(cfg)


def test_training_inputs_are_the_native_mapper_s(cfg, data):
    """Flipped and not; the image without dense pose is left out."""
    register_datasets([data])
    write_symmetries(file_path("UV_symmetry_transforms.mat"))
    found, seen = iter(Trainer.build_train_loader(cfg)), {}
    record = DatasetCatalog.get(data)[0]
    for _ in range(50):
        (item,) = next(found)
        assert item["image_id"] == 1
        box = item["instances"].gt_boxes.tensor[0].tolist()
        seen[box[0] == BOX[0]] = item["instances"].gt_densepose[0]
        if len(seen) == 2:
            break
    for upright, theirs in seen.items():
        mapper = DatasetMapper(
            Augmentation((64,), 400, flip=True),
            "RGB",
            with_targets=True,
            with_densepose=True,
            symmetries=load_symmetries(),
        )
        draws = (np.random.default_rng(seed) for seed in range(50))
        items = (mapper(record, rng) for rng in draws)
        ours = next(x for x in items if (x["gt_boxes"][0, 0] == BOX[0]).item() is upright)
        (points,) = ours["gt_densepose"]
        pairs = [
            (points.x, theirs.x),
            (points.y, theirs.y),
            (points.charts.float(), theirs.i),
            (points.u, theirs.u),
            (points.v, theirs.v),
            (points.parts.float(), theirs.segm),
        ]
        for value, expected in pairs:
            assert torch.equal(value, expected)


def test_predictions_are_saved_as_the_native_engine_s(cfg):
    model = build_model(cfg).eval()
    image = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 96, "width": 96}])
    record = prediction_record(1, fields_of(output["instances"]))
    assert len(record["densepose"]) == len(record["boxes"]) == 3
    for surface, (x0, y0, x1, y1) in zip(
        record["densepose"], record["boxes"].tolist(), strict=True
    ):
        assert decode_iuv(surface).shape == (3, max(int(y1 - y0), 1), max(int(x1 - x0), 1))
