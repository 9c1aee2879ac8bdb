"""Every config key arrives where it works, and nowhere else: without Detectron2.

`config_arrivals.json` says which constructed values each key changes, and to what; it was read by a
person when it was recorded. A key that is forgotten, or handed to a neighbour, differs from it.
"""

import json

import pytest
from paths import REPOSITORY
from record_config_arrivals import CASES, arrivals

from moco_det.config.loading import KEYS, get_cfg, leaves

# Keys without an entry, and what holds them to their meaning instead.
ELSEWHERE = {
    "VERSION": "one value",
    "MODEL.META_ARCHITECTURE": "test_meta_arch.py",
    "MODEL.DENSEPOSE_ON": "test_roi_heads.py",
    "MODEL.DEVICE": "test_trainer.py",
    "MODEL.WEIGHTS": "test_trainer.py",
    "MODEL.BACKBONE.NAME": "test_backbones.py",
    "MODEL.RESNETS.OUT_FEATURES": "test_backbones.py",
    "MODEL.RESNETS.RES5_DILATION": "test_backbones.py",
    "MODEL.FPN.IN_FEATURES": "test_backbones.py",
    "MODEL.RPN.IN_FEATURES": "test_rpn.py",
    "MODEL.ROI_HEADS.NAME": "test_roi_heads.py",
    "MODEL.ROI_BOX_HEAD.NAME": "test_box_head.py",
    "MODEL.ROI_DENSEPOSE_HEAD.NAME": "one value",
    "MODEL.ROI_DENSEPOSE_HEAD.DECODER_ON": "one value",
    "MODEL.ROI_DENSEPOSE_HEAD.LOSS_NAME": "two names of one thing",
    "MODEL.ROI_DENSEPOSE_HEAD.PREDICTOR_NAME": "two names of one thing",
    "MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE": "follows from two others",
    "MODEL.ROI_DENSEPOSE_HEAD.NUM_PATCHES": "one value",
    "MODEL.SEM_SEG_HEAD.NAME": "one value",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": "follows from the backbone; test_semantic_head.py",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": "test_semantic_head.py",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "one value",
    "INPUT.CROP.ENABLED": "test_mapper.py",
    "INPUT.MAX_IMAGE_PIXELS": "a limit of common.images; test_check_data.py",
    "INPUT.CROP.TYPE": "test_mapper.py",
    "DATASETS.TEST": "test_inference.py",
    "SOLVER.REFERENCE_WORLD_SIZE": "test_checks_batch_plan.py",
    "SOLVER.RESCALE_INTERVAL": "one value",
    "TEST.EXPECTED_RESULTS": "test_evaluation.py",
    "TEST.KEYPOINT_OKS_SIGMAS": "test_coco.py",
    "OUTPUT_DIR": "test_trainer.py",
    "CUDNN_BENCHMARK": "of speed alone",
    "FLOAT32_PRECISION": "one value",
    "VIS_PERIOD": "one value",
}


@pytest.fixture(scope="module")
def recorded():
    return json.loads((REPOSITORY / "tests/support/config_arrivals.json").read_text())


@pytest.mark.parametrize("experiment", CASES)
def test_a_key_changes_what_it_did_when_it_was_recorded(experiment, recorded):
    assert recorded[experiment].keys() == CASES[experiment].keys()
    known: dict = {}
    for key in CASES[experiment]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            found = arrivals(experiment, key, monkeypatch, known)
        assert json.loads(json.dumps(found)) == recorded[experiment][key], key
        assert found["changed"] > 0, key


def test_every_key_is_either_recorded_or_tested_elsewhere():
    tried = {key for cases in CASES.values() for key in cases}
    single = {key for key, values in KEYS["supported"].items() if len(values) == 1}
    keys = {key for key, _ in leaves(get_cfg())}
    assert not tried & ELSEWHERE.keys()
    assert sorted(keys - single - tried - ELSEWHERE.keys()) == []
