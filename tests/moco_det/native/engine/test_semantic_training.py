"""A segmentor from YAML to mIoU, through the native engine's own loop."""

import json
import math

import pytest
import torch
from tiny_semantic import write_tiny_segmentor, write_tiny_semantic
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.config.checks import plan_batch
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate
from moco_det.native.data.loader import (
    build_test_loader,
    build_train_loader,
    build_training_records,
)
from moco_det.native.engine.trainer import evaluate_weights, prepare, train
from moco_det.native.modeling.meta_arch import build_model
from moco_det.weights.files import load_backbone_weights


@pytest.fixture
def make_cfg(tmp_path):
    path = write_tiny_segmentor(tmp_path / "tiny.yaml", write_tiny_semantic(tmp_path / "voc"))

    def make(*opts):
        return load_config(str(path), ["OUTPUT_DIR", str(tmp_path / "out"), *opts])

    return make


def test_it_learns_its_own_images(make_cfg, tmp_path):
    """Data, targets, loss, inference and evaluator fit together, or the squares are not found."""
    opts = ["SOLVER.MAX_ITER", "30", "SOLVER.STEPS", "(24,)"]
    cfg = make_cfg(*opts, "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "6")
    results = train(cfg)["sem_seg"]
    assert results["mIoU"] > 75
    assert results["pACC"] > 90
    assert math.isnan(results["IoU-cat"])
    (saved,) = (tmp_path / "out" / "inference").iterdir()
    predictions = json.loads(saved.read_text())
    assert len(predictions) == 6
    assert predictions[0].keys() == {"image_id", "sem_seg"}
    again = evaluate(get_dataset(cfg.DATASETS.TEST[0]), predictions)["sem_seg"]
    assert again["mIoU"] == results["mIoU"]
    weights = str(tmp_path / "out" / "model_final.pth")
    other = evaluate_weights(make_cfg("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "b")))
    assert other["sem_seg"]["mIoU"] == pytest.approx(results["mIoU"])


def test_batches_are_of_crops_and_do_not_depend_on_where_a_run_stopped(make_cfg):
    cfg = make_cfg()
    records = build_training_records(cfg)
    plan = plan_batch(cfg, processes=1)
    batches = build_train_loader(cfg, plan, records, seed=5)
    first, second = next(batches), next(batches)
    assert [tuple(x["image"].shape) for x in first] == [(3, 97, 97)] * 4
    assert [tuple(x["sem_seg"].shape) for x in first] == [(97, 97)] * 4
    assert {label for x in first for label in x["sem_seg"].unique().tolist()} <= {0, 3, 15, 255}
    resumed = next(build_train_loader(cfg, plan, records, seed=5, start=1))
    for a, b in zip(second, resumed, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["sem_seg"], b["sem_seg"])


def test_evaluation_is_at_the_original_size_without_labels(make_cfg):
    cfg = make_cfg()
    (item,) = next(build_test_loader(cfg, build_training_records(cfg)))
    assert item.keys() == {"image", "image_id", "height", "width"}
    assert tuple(item["image"].shape) == (3, 96, 128)
    assert item["image"].dtype == torch.uint8


def test_bad_settings_are_refused_before_anything_is_built(make_cfg, tmp_path):
    with pytest.raises(UserError, match="INPUT.CROP.TYPE is 'relative_range'"):
        prepare(make_cfg("INPUT.CROP.TYPE", "relative_range"))
    with pytest.raises(UserError, match=r"MODEL.SEM_SEG_HEAD.NUM_CLASSES is 20, .* set it to 21"):
        prepare(make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "20"))
    detector = write_tiny_config(tmp_path / "d.yaml", write_tiny_voc(tmp_path / "objects"))
    cfg = load_config(str(detector), ["INPUT.RANDOM_SCALE", "(0.5, 2.0)"])
    with pytest.raises(UserError, match="INPUT.RANDOM_SCALE .* SemanticSegmentor only"):
        prepare(cfg)
    with pytest.raises(UserError, match="native engine crops for SemanticSegmentor only"):
        prepare(load_config(str(detector), ["INPUT.CROP.ENABLED", "True"]))


def test_backbone_weights_leave_the_head_alone(make_cfg, tmp_path):
    torch.manual_seed(1)
    source, model = build_model(make_cfg()), build_model(make_cfg())
    backbone = {k: v for k, v in source.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    before = {k: v.clone() for k, v in model.sem_seg_head.state_dict().items()}
    report = load_backbone_weights(model, str(tmp_path / "backbone.pth"))
    assert all(name.startswith("sem_seg_head.") for name in report.missing)
    assert all(torch.equal(v, before[k]) for k, v in model.sem_seg_head.state_dict().items())
    weights = model.backbone.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in source.backbone.state_dict().items())
