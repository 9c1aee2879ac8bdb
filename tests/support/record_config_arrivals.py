"""Record where each config key arrives in the native engine: which constructed values it changes.

    python tests/support/record_config_arrivals.py

Read the result before it is committed: a key's value is to stand where the key says, and nowhere
else. `CASES` has, for each key of defaults.yaml that the native engine honours, a value other than
the default and an experiment in which the key has work.
"""

import json
from pathlib import Path

import pytest
from constructed import construct

from moco_det.config.loading import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHOWN = 6  # changed values that are recorded of each key; their number is recorded too

_SMALL = """
MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.RESNETS.STEM_OUT_CHANNELS 8
MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4
MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 16
MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (16,16) MODEL.SEM_SEG_HEAD.CONVS_DIM 16
MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM 16 MODEL.ROI_DENSEPOSE_HEAD.NUM_STACKED_CONVS 2
SOLVER.MAX_ITER 100 SOLVER.STEPS (60,80) SOLVER.WARMUP_ITERS 20 SEED 5 DATASETS.TRAIN ('a',)
DATASETS.TEST ('b',)
"""

EXPERIMENTS = {
    "mask": "coco_R50_FPN_1x_moco",
    "keypoints": "coco_R50_FPN_keypoint_2x_moco",
    "C4": "voc_R50_C4_24k_moco",
    "DC5": "voc_R50_DC5_24k_moco",
    "densepose": "coco_R50_FPN_densepose_s1x_moco",
    "semantic": "voc_R50_FCN16_30k_moco",
}

# Experiment -> key -> value, with the other keys that it needs to have an effect and, after "+",
# those that must change with it.
CASES = {
    "mask": {
        "MODEL.MASK_ON": "False",
        "MODEL.PIXEL_MEAN": "[1.5,2.5,3.5]",
        "MODEL.PIXEL_STD": "[4.5,5.5,6.5]",
        "MODEL.BACKBONE.FREEZE_AT": "3",
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1": "True",
        "MODEL.RESNETS.DEPTH": "101",
        "MODEL.RESNETS.NUM_GROUPS": "2",
        "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "32",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": "12",
        "MODEL.FPN.OUT_CHANNELS": "12",
        "MODEL.FPN.NORM": "",
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": "3",
        "MODEL.ANCHOR_GENERATOR.SIZES": "[[8],[16],[24],[48],[96]]",
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "[[1.0,4.0]]",
        "MODEL.ANCHOR_GENERATOR.OFFSET": "0.5",
        "MODEL.RPN.IOU_THRESHOLDS": "[0.2,0.8]",
        "MODEL.RPN.IOU_LABELS": "[0,-1,0]",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "99",
        "MODEL.RPN.POSITIVE_FRACTION": "0.45",
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": "1.25",
        "MODEL.RPN.BBOX_REG_WEIGHTS": "(2.0,3.0,4.0,5.0)",
        "MODEL.RPN.SMOOTH_L1_BETA": "0.15",
        "MODEL.RPN.LOSS_WEIGHT": "1.75",
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "201",
        "MODEL.RPN.PRE_NMS_TOPK_TEST": "202",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": "203",
        "MODEL.RPN.POST_NMS_TOPK_TEST": "204",
        "MODEL.RPN.NMS_THRESH": "0.65",
        "MODEL.ROI_HEADS.NUM_CLASSES": "7",
        "MODEL.ROI_HEADS.IN_FEATURES": "['p3','p4']",
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": "[0.55]",
        "MODEL.ROI_HEADS.IOU_LABELS": "[1,0]",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "77",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": "0.35",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.015",
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": "0.45",
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": "False",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": "1.35",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "(6.0,7.0,8.0,9.0)",
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": "0.25",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "5",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "3",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
        "MODEL.ROI_BOX_HEAD.NUM_FC": "3",
        "MODEL.ROI_BOX_HEAD.FC_DIM": "24",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": "1",
        "MODEL.ROI_BOX_HEAD.CONV_DIM": "20 MODEL.ROI_BOX_HEAD.NUM_CONV 1",
        "MODEL.ROI_BOX_HEAD.NORM": "BN MODEL.ROI_BOX_HEAD.NUM_CONV 1",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": "True",
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": "6",
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": "4",
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlign",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": "2",
        "MODEL.ROI_MASK_HEAD.CONV_DIM": "20",
        "MODEL.ROI_MASK_HEAD.NORM": "BN",
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": "True",
        "INPUT.MIN_SIZE_TRAIN": "(401,402)",
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range INPUT.MIN_SIZE_TRAIN (401,402)",
        "INPUT.MAX_SIZE_TRAIN": "901",
        "INPUT.MIN_SIZE_TEST": "403",
        "INPUT.MAX_SIZE_TEST": "902",
        "INPUT.RANDOM_FLIP": "none",
        "INPUT.FORMAT": "BGR",
        "INPUT.MASK_FORMAT": "bitmask",
        "DATASETS.TRAIN": "('c',)",
        "DATALOADER.NUM_WORKERS": "3",
        "DATALOADER.ASPECT_RATIO_GROUPING": "False",
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler DATALOADER.REPEAT_THRESHOLD 0.9",
        "DATALOADER.REPEAT_SQRT":
            "False DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler "
            "DATALOADER.REPEAT_THRESHOLD 0.9",
        "DATALOADER.REPEAT_THRESHOLD":
            "2.0 DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "False",
        "SOLVER.OPTIMIZER": "Adam",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
        "SOLVER.POLY_LR_POWER": "0.5 SOLVER.LR_SCHEDULER_NAME WarmupPolyLR",
        "SOLVER.BASE_LR_END": "0.01 SOLVER.LR_SCHEDULER_NAME WarmupCosineLR",
        "SOLVER.MAX_ITER": "130",
        "SOLVER.BASE_LR": "0.0125",
        "SOLVER.MOMENTUM": "0.85",
        "SOLVER.NESTEROV": "True",
        "SOLVER.WEIGHT_DECAY": "0.0005",
        "SOLVER.WEIGHT_DECAY_NORM": "0.0006",
        "SOLVER.WEIGHT_DECAY_BIAS": "0.0007",
        "SOLVER.BIAS_LR_FACTOR": "2.5",
        "SOLVER.GAMMA": "0.3",
        "SOLVER.STEPS": "(50,70)",
        "SOLVER.WARMUP_FACTOR": "0.005",
        "SOLVER.WARMUP_ITERS": "30",
        "SOLVER.WARMUP_METHOD": "constant",
        "SOLVER.CHECKPOINT_PERIOD": "11",
        "SOLVER.IMS_PER_BATCH": "12",
        "SOLVER.GRADIENT_ACCUMULATION_STEPS": "2",
        "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm SOLVER.CLIP_GRADIENTS.ENABLED True",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "0.75 SOLVER.CLIP_GRADIENTS.ENABLED True",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE":
            "3.0 SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_TYPE norm",
        "SOLVER.AMP.ENABLED": "True",
        "TEST.EVAL_PERIOD": "13",
        "TEST.DETECTIONS_PER_IMAGE": "66",
        "TEST.PRECISE_BN.ENABLED": "False",
        "TEST.PRECISE_BN.NUM_ITER": "17 SOLVER.GRADIENT_ACCUMULATION_STEPS 2",
        "SEED": "6",
    },
    "keypoints": {
        "MODEL.KEYPOINT_ON": "False",
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "5",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": "6",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": "3",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIAlign",
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(12,14,12)",
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": "3",
        "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": "False",
        "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": "1.45",
    },
    "C4": {
        "MODEL.ROI_HEADS.NUM_CLASSES": "7",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "10",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "3",
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.ANCHOR_GENERATOR.SIZES": "[[24,48]]",
    },
    "DC5": {"MODEL.ROI_BOX_HEAD.FC_DIM": "24", "MODEL.ANCHOR_GENERATOR.SIZES": "[[24,48]]"},
    "densepose": {
        "MODEL.ROI_DENSEPOSE_HEAD.NUM_STACKED_CONVS": "3",
        "MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM": "12",
        "MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_KERNEL": "5",
        "MODEL.ROI_DENSEPOSE_HEAD.DECONV_KERNEL": "2",
        "MODEL.ROI_DENSEPOSE_HEAD.UP_SCALE": "4 + MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE 112",
        "MODEL.ROI_DENSEPOSE_HEAD.POOLER_TYPE": "ROIAlignV2",
        "MODEL.ROI_DENSEPOSE_HEAD.POOLER_RESOLUTION":
            "7 + MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE 28",
        "MODEL.ROI_DENSEPOSE_HEAD.POOLER_SAMPLING_RATIO": "3",
        "MODEL.ROI_DENSEPOSE_HEAD.NUM_COARSE_SEGM_CHANNELS": "2",
        "MODEL.ROI_DENSEPOSE_HEAD.FG_IOU_THRESHOLD": "0.66",
        "MODEL.ROI_DENSEPOSE_HEAD.INDEX_WEIGHTS": "4.5",
        "MODEL.ROI_DENSEPOSE_HEAD.PART_WEIGHTS": "1.5",
        "MODEL.ROI_DENSEPOSE_HEAD.POINT_REGRESSION_WEIGHTS": "0.02",
    },
    "semantic": {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "9",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": "12",
        "MODEL.SEM_SEG_HEAD.NORM": "",
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": "1.55",
        "MODEL.SEM_SEG_HEAD.DILATION": "2",
        "INPUT.RANDOM_SCALE": "(0.75,1.5)",
        "INPUT.SCALE_CHOICES": "(0.5,1.25) INPUT.RANDOM_SCALE ()",
        "INPUT.FIXED_SIZE": "(40,48) INPUT.CROP.ENABLED False",
        "INPUT.RANDOM_ROTATION": "7.5 INPUT.FIXED_SIZE (40,48) INPUT.CROP.ENABLED False",
        "INPUT.CROP.SIZE": "[33,35]",
        "INPUT.RANDOM_FLIP": "none",
        "INPUT.MIN_SIZE_TEST": "404",
    },
}  # fmt: skip


NOT_MIRRORED = {"densepose"}  # a mirror needs files: which parts of a body are left and right


def built(experiment: str, pairs: list[str], monkeypatch) -> dict:
    """What is constructed of an experiment, made small, with KEY VALUE pairs."""
    pairs = [*_SMALL.split(), *["INPUT.RANDOM_FLIP", "none"] * (experiment in NOT_MIRRORED), *pairs]
    path = CONFIGS / f"{EXPERIMENTS[experiment]}.yaml"
    return construct(load_config(path, [value.strip("'\"") for value in pairs]), monkeypatch)


def arrivals(experiment: str, key: str, monkeypatch, known: dict | None = None) -> dict:
    """What the key's value changes, beside the other keys of its case.

    `known`: (experiment, other keys) -> what was constructed before.
    """
    known = {} if known is None else known
    case, _, changing = CASES[experiment][key].partition(" + ")
    value, *needed = case.split(" ")
    given = experiment, *needed
    if given not in known:
        known[given] = built(experiment, needed, monkeypatch)
    before, after = (
        known[given],
        built(experiment, [*needed, *changing.split(), key, value], monkeypatch),
    )
    paths = sorted(before.keys() | after.keys())
    changed = {p: after.get(p, "absent") for p in paths if before.get(p) != after.get(p)}
    return {"changed": len(changed), **dict(list(changed.items())[:SHOWN])}


def main() -> None:
    known: dict = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorded = {
            experiment: {key: arrivals(experiment, key, monkeypatch, known) for key in cases}
            for experiment, cases in CASES.items()
        }
    text = json.dumps(recorded, indent=1)
    (Path(__file__).parent / "config_arrivals.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
