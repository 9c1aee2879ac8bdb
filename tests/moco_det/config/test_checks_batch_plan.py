"""How a batch is spread: hand values."""

import pytest

from moco_det.common.errors import UserError
from moco_det.config.checks import BatchPlan, plan_batch, scaled_to_processes
from moco_det.config.loading import get_cfg


def plan(images, processes, accumulation, norm="SyncBN"):
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = images
    cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS = accumulation
    cfg.MODEL.RESNETS.NORM = norm
    return plan_batch(cfg, processes)


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_paper_s_recipe_is_the_paper_s_on_any_number_of_gpus(processes):
    found = plan(16, processes, 1)
    assert found.images_per_forward == 16 // processes
    assert found.bn_group == 16
    assert found.differences(0.02) == []
    assert found.describe(0.02).endswith("not as in the paper: nothing")


def test_accumulation_keeps_the_step_and_shrinks_the_bn_group():
    found = plan(16, 1, 8)
    assert (found.images, found.images_per_forward, found.bn_group) == (16, 2, 2)
    assert found.differences(0.02) == ["BN statistics over 2 images (the paper: 16)"]
    line = found.describe(0.02)
    assert line.startswith("batch 16 = 1 process(es) x 2 images x 8 accumulated; BN over 2 images")


def test_naive_sync_bn_is_synchronised_over_all_processes():
    found = plan(16, 8, 1, "naiveSyncBN")
    assert found.bn_group == 16
    assert found.differences(0.02) == []
    assert "BN over 16 images (naiveSyncBN)" in found.describe(0.02)


def test_bn_that_is_not_synchronised_or_frozen():
    assert plan(16, 8, 1, "BN").bn_group == 2
    assert plan(16, 8, 1, "FrozenBN").bn_group == 0
    assert "NORM 'FrozenBN'" in plan(16, 8, 1, "FrozenBN").describe(0.02)


def test_smaller_batches_and_the_linear_rule():
    assert plan(8, 1, 1).differences(0.01) == [
        "a step of 8 images (the paper: 16)",
        "BN statistics over 8 images (the paper: 16)",
    ]
    wrong = "learning rate 0.02 (the paper's for 8 images would be 0.01)"
    assert plan(8, 1, 1).differences(0.02)[0] == wrong


def test_semantic_segmentation_has_no_one_learning_rate():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.RESNETS.NORM = "SyncBN"
    found = plan_batch(cfg, 8)
    assert found.differences(0.003) == found.differences(0.01) == []


@pytest.mark.parametrize("args", [(16, 3, 1), (16, 2, 3), (0, 1, 1), (16, 1, 0)])
def test_what_does_not_divide_is_refused(args):
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH .* SOLVER.GRADIENT_ACCUMULATION"):
        plan(*args)


def test_a_plan_says_what_it_is():
    assert BatchPlan(4, 2, 1, "").describe(0.005).startswith("batch 4 = 2 process(es) x 2 images")


def make_cfg(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def test_recipe_scales_with_the_processes():
    """The example in the documentation of Detectron2's `auto_scale_workers`."""
    cfg = make_cfg(
        IMS_PER_BATCH=16, BASE_LR=0.1, MAX_ITER=5000, STEPS=(4000,), CHECKPOINT_PERIOD=1000,
        REFERENCE_WORLD_SIZE=8,
    )  # fmt: skip
    solver = scaled_to_processes(cfg, 16).SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (32, 0.2)
    assert (solver.MAX_ITER, solver.STEPS) == (2500, (2000,))
    assert (solver.CHECKPOINT_PERIOD, solver.WARMUP_ITERS) == (500, 500)
    assert solver.REFERENCE_WORLD_SIZE == 16
    assert scaled_to_processes(cfg, 8) is cfg
    assert scaled_to_processes(make_cfg(REFERENCE_WORLD_SIZE=0), 3).SOLVER.IMS_PER_BATCH == 16
    with pytest.raises(UserError, match="REFERENCE_WORLD_SIZE 5"):
        scaled_to_processes(make_cfg(REFERENCE_WORLD_SIZE=5), 2)
