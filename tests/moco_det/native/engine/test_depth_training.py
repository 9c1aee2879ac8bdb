"""Depth from YAML to its error, and a run of Adam that goes on where it stopped."""

import json

import pytest
import torch
from tiny_nyud import SIZE, write_tiny_nyud, write_tiny_pixel_config

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
from moco_det.native.engine.trainer import prepare, train


@pytest.fixture
def make_cfg(tmp_path):
    path = write_tiny_pixel_config(
        tmp_path / "a.yaml", write_tiny_nyud(tmp_path / "nyud"), depth=True
    )

    def make(*opts, output="out"):
        return load_config(str(path), ["OUTPUT_DIR", str(tmp_path / output), *map(str, opts)])

    return make


def test_it_learns_its_own_rooms(make_cfg, tmp_path):
    """Maps, loss, inference and evaluator fit together, or its guess is no better than one number.

    The best such number, the mean of the depths, is 1.11 m off.
    """
    cfg = make_cfg("SOLVER.MAX_ITER", 25, "SOLVER.BASE_LR", 0.04, "INPUT.SCALE_CHOICES", "()",
                   "INPUT.RANDOM_ROTATION", 0.0, "TEST.PRECISE_BN.ENABLED", True,
                   "TEST.PRECISE_BN.NUM_ITER", 3)  # fmt: skip
    results = train(cfg)
    assert results.keys() == {"depth"}
    assert results["depth"]["rmse"] < 0.7
    (saved,) = (tmp_path / "out" / "inference").iterdir()
    predictions = json.loads(saved.read_text())
    assert [p.keys() for p in predictions] == [{"image_id", "depth"}] * 3
    assert predictions[0]["depth"]["size"] == list(SIZE)  # not that of the frame
    assert evaluate(get_dataset(cfg.DATASETS.TEST[0]), predictions) == results
    logged = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert logged["depth/rmse"] == results["depth"]["rmse"]


def test_a_run_of_adam_goes_on_where_it_stopped(make_cfg, tmp_path):
    """Its moments, steps and the poly schedule too: the weights are those of a run in one go."""
    opts = "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2
    train(make_cfg(*opts, output="whole"))
    cfg = make_cfg(*opts, output="parts")
    train(cfg)
    (tmp_path / "parts/model_final.pth").unlink()
    (tmp_path / "parts/last_checkpoint").write_text("model_0000001.pth")
    train(cfg, resume=True)
    whole, parts = (torch.load(tmp_path / f"{name}/model_final.pth") for name in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(value, parts["model"][k]) for k, value in whole["model"].items())
    assert {float(s["step"]) for s in parts["optimizer"]["state"].values()} == {4.0}


def test_inputs_are_frames(make_cfg):
    cfg = make_cfg()
    records = build_training_records(cfg)
    batch = next(build_train_loader(cfg, plan_batch(cfg, processes=1), records, seed=5))
    assert {tuple(x["image"].shape) for x in batch} == {(3, 48, 80)}
    assert {tuple(x["depth"].shape) for x in batch} == {(48, 80)}
    assert {x["depth"].dtype for x in batch} == {torch.float32}
    (item,) = next(build_test_loader(cfg, records))
    assert item.keys() == {"image", "image_id", "height", "width"}
    assert tuple(item["image"].shape) == (3, 48, 80)
    assert (item["height"], item["width"]) == SIZE


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.FIXED_SIZE", "()", "INPUT.RANDOM_ROTATION", 0.0), r"INPUT.FIXED_SIZE is \(\)"),
        (("MODEL.SEM_SEG_HEAD.NAME", "FCN16Head"), "DepthEstimator and FCNDepthHead go together"),
        (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2), "set it to 1"),
        (("MODEL.META_ARCHITECTURE", "SemanticSegmentor"), "go together"),
        (("SOLVER.NESTEROV", True), "SOLVER.NESTEROV is True, which Adam does not have"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_built(make_cfg, opts, message):
    with pytest.raises(UserError, match=message):
        prepare(make_cfg(*opts))


def test_data_of_another_task(make_cfg):
    cfg = make_cfg()
    name = cfg.DATASETS.TRAIN[0].replace("nyud_depth", "nyud_sem_seg")
    with pytest.raises(
        UserError, match="has label maps, but .* DepthEstimator learns from depth maps"
    ):
        prepare(make_cfg("DATASETS.TRAIN", name, "DATASETS.TEST", name))
