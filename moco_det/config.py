"""Detectron2's YAML configuration, for both engines.

The keys, their defaults and the file format (`_BASE_`, `KEY VALUE` pairs, tuples written as
strings) are Detectron2's. Every Detectron2 key falls into one of three kinds:

- honoured: it is in `get_cfg()`;
- limited: it is in `get_cfg()` too, but the native engine knows only the values in `SUPPORTED`, and
  any other value is refused;
- inert (`INERT`): it belongs to a part that `SUPPORTED` keeps switched off. It has no effect in
  Detectron2 either while that part is off, so it is accepted and dropped, and Detectron2's own
  YAMLs load unchanged.

Anything else is an error that names the key and the nearest known one.
"""

import ast
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from moco_det.errors import UserError

# Keys that Detectron2 does not have (dotted names); the plugin adds them to its config.
OUR_KEYS = ("SOLVER.GRADIENT_ACCUMULATION_STEPS",)

_MODEL = {
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    "LOAD_PROPOSALS": False,
    "DEVICE": "cuda",
    "WEIGHTS": "",
    "PIXEL_MEAN": [103.530, 116.280, 123.675],  # in INPUT.FORMAT order, here BGR
    "PIXEL_STD": [1.0, 1.0, 1.0],  # MSRA weights have the deviation folded into conv1
    "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
    "RESNETS": {
        "DEPTH": 50,
        "OUT_FEATURES": ["res4"],
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        "NORM": "FrozenBN",
        "STRIDE_IN_1X1": True,  # MSRA places the stride there; torchvision and MoCo do not
        "RES5_DILATION": 1,
        "RES2_OUT_CHANNELS": 256,  # 64 for
        "STEM_OUT_CHANNELS": 64,
        "DEFORM_ON_PER_STAGE": [False, False, False, False],
    },
    "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"},
    "PROPOSAL_GENERATOR": {"NAME": "RPN", "MIN_SIZE": 0},
    "ANCHOR_GENERATOR": {
        "NAME": "DefaultAnchorGenerator",
        "SIZES": [[32, 64, 128, 256, 512]],  # one list per feature map, or one for all
        "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],  # height / width
        "OFFSET": 0.0,
    },
    "RPN": {
        "HEAD_NAME": "StandardRPNHead",
        "IN_FEATURES": ["res4"],
        "BOUNDARY_THRESH": -1,
        "IOU_THRESHOLDS": [0.3, 0.7],
        "IOU_LABELS": [0, -1, 1],
        "BATCH_SIZE_PER_IMAGE": 256,
        "POSITIVE_FRACTION": 0.5,
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "SMOOTH_L1_BETA": 0.0,
        "LOSS_WEIGHT": 1.0,
        "PRE_NMS_TOPK_TRAIN": 12000,  # per feature map
        "PRE_NMS_TOPK_TEST": 6000,
        "POST_NMS_TOPK_TRAIN": 2000,  # per image, over all feature maps
        "POST_NMS_TOPK_TEST": 1000,
        "NMS_THRESH": 0.7,
        "CONV_DIMS": [-1],
    },
    "ROI_HEADS": {
        "NAME": "Res5ROIHeads",
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["res4"],
        "IOU_THRESHOLDS": [0.5],
        "IOU_LABELS": [0, 1],
        "BATCH_SIZE_PER_IMAGE": 512,
        "POSITIVE_FRACTION": 0.25,
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
        "PROPOSAL_APPEND_GT": True,
    },
    "ROI_BOX_HEAD": {
        "NAME": "",
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        "SMOOTH_L1_BETA": 0.0,
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        "NUM_FC": 0,
        "FC_DIM": 1024,
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NORM": "",
        "CLS_AGNOSTIC_BBOX_REG": False,
        "TRAIN_ON_PRED_BOXES": False,
        "USE_FED_LOSS": False,
        "USE_SIGMOID_CE": False,
    },
    "ROI_KEYPOINT_HEAD": {"MIN_KEYPOINTS_PER_IMAGE": 1},
}

_INPUT = {
    "MIN_SIZE_TRAIN": (800,),
    "MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MAX_SIZE_TRAIN": 1333,
    "MIN_SIZE_TEST": 800,  # 0: no resizing
    "MAX_SIZE_TEST": 1333,
    "RANDOM_FLIP": "horizontal",
    "CROP": {"ENABLED": False},
    "FORMAT": "BGR",
    "MASK_FORMAT": "polygon",
}

_DATASETS = {"TRAIN": (), "TEST": ()}

_DATALOADER = {
    "NUM_WORKERS": 4,
    "ASPECT_RATIO_GROUPING": True,
    "SAMPLER_TRAIN": "TrainingSampler",
    "FILTER_EMPTY_ANNOTATIONS": True,
    "REPEAT_THRESHOLD": 0.0,  # share of the images below which a class's images are repeated
    "REPEAT_SQRT": True,
}

_SOLVER = {
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "MAX_ITER": 40000,
    "BASE_LR": 0.001,
    "BASE_LR_END": 0.0,
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,
    "WEIGHT_DECAY_BIAS": None,  # None: WEIGHT_DECAY
    "BIAS_LR_FACTOR": 1.0,
    "GAMMA": 0.1,
    "STEPS": (30000,),
    "WARMUP_FACTOR": 0.001,
    "WARMUP_ITERS": 1000,
    "WARMUP_METHOD": "linear",
    "RESCALE_INTERVAL": False,
    "CHECKPOINT_PERIOD": 5000,
    "IMS_PER_BATCH": 16,  # of one optimizer step, over all processes
    "GRADIENT_ACCUMULATION_STEPS": 1,  # forward passes that share IMS_PER_BATCH
    "REFERENCE_WORLD_SIZE": 0,
    "CLIP_GRADIENTS": {
        "ENABLED": False,
        "CLIP_TYPE": "value",
        "CLIP_VALUE": 1.0,
        "NORM_TYPE": 2.0,
    },
    "AMP": {"ENABLED": False},
}

_TEST = {
    "EXPECTED_RESULTS": [],  # of [task, metric, value, tolerance], checked when a run ends
    "EVAL_PERIOD": 0,
    "DETECTIONS_PER_IMAGE": 100,
    "AUG": {"ENABLED": False},
    "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}

_DEFAULTS = {
    "VERSION": 2,
    "MODEL": _MODEL,
    "INPUT": _INPUT,
    "DATASETS": _DATASETS,
    "DATALOADER": _DATALOADER,
    "SOLVER": _SOLVER,
    "TEST": _TEST,
    "OUTPUT_DIR": "./output",
    "SEED": -1,
    "CUDNN_BENCHMARK": False,
    "FLOAT32_PRECISION": "",
    "VIS_PERIOD": 0,
}

# The values that the native engine knows, where Detectron2 knows more.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "VERSION": (2,),
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.MASK_ON": (False,),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.BACKBONE.NAME": (
        "build_resnet_backbone",
        "build_resnet_fpn_backbone",
        "build_resnet_dilated_c5_backbone",
    ),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN"),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False, False, False, False],),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BOUNDARY_THRESH": (-1,),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.RPN.CONV_DIMS": ([-1],),
    "MODEL.ROI_HEADS.NAME": ("Res5ROIHeads", "Res5ROIHeadsExtraNorm", "StandardROIHeads"),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2",),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "none"),
    "INPUT.CROP.ENABLED": (False,),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.RESCALE_INTERVAL": (False,),
    "TEST.AUG.ENABLED": (False,),
    "FLOAT32_PRECISION": ("",),
    "VIS_PERIOD": (0,),
}

# Detectron2's keys and sections that act only when something that `SUPPORTED` refuses is asked for.
INERT = (
    "MODEL.ROI_MASK_HEAD",
    "MODEL.ROI_KEYPOINT_HEAD.NAME",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT",
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS",
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.RETINANET",
    "MODEL.SEM_SEG_HEAD",
    "MODEL.PANOPTIC_FPN",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ANCHOR_GENERATOR.ANGLES",
    "MODEL.RESNETS.DEFORM_MODULATED",
    "MODEL.RESNETS.DEFORM_NUM_GROUPS",
    "INPUT.CROP.TYPE",
    "INPUT.CROP.SIZE",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "SOLVER.NUM_DECAYS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.AUG.MIN_SIZES",
    "TEST.AUG.MAX_SIZE",
    "TEST.AUG.FLIP",
    "GLOBAL",
)


def get_cfg() -> CfgNode:
    """A fresh, unfrozen copy of the defaults."""
    return CfgNode(_DEFAULTS).clone()


def load_config(path: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a YAML file over the defaults, then the `KEY VALUE KEY VALUE ...` list `opts` over both.

    Returns the frozen config. Raises `UserError` for an unreadable file, an unknown key, a value of
    the wrong type, and a value that the native engine does not support.
    """
    cfg = get_cfg()
    for key, value in leaves(_read_yaml(path)):
        _set(cfg, key, value, source=path)
    for key, value in _pairs(opts):
        _set(cfg, key, value, source="the command line")
    check_supported(cfg)
    cfg.freeze()
    return cfg


def check_supported(cfg: CfgNode) -> None:
    """UserError where a key asks for a value that the native engine does not have."""
    values = dict(leaves(cfg))
    for key, supported in SUPPORTED.items():
        if values[key] not in supported:
            known = ", ".join(map(repr, supported))
            raise UserError(f"{key} {values[key]!r}: the native engine supports only {known}")


def check_dilated_c5(cfg: CfgNode) -> None:
    """UserError unless the ResNet of `cfg` ends in a res5 of dilation 2 and returns only that."""
    needed = {"RES5_DILATION": 2, "OUT_FEATURES": ["res5"]}
    if cfg.MODEL.RESNETS.DEPTH < 50:
        needed = {"DEPTH": "50 or more: smaller ones have no dilation"}
    for key, value in needed.items():
        if cfg.MODEL.RESNETS[key] != value:
            raise UserError(
                f"MODEL.RESNETS.{key} is {cfg.MODEL.RESNETS[key]}; the backbone "
                f"build_resnet_dilated_c5_backbone needs {value}"
            )


def on_available_device(cfg: CfgNode) -> CfgNode:
    """`cfg` itself, or with MODEL.DEVICE "cpu" where it asks for CUDA and there is none."""
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return cfg
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if frozen:
        cfg.freeze()
    return cfg


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted name, value) pairs of nested dicts, in order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_yaml(path: str) -> dict:
    try:
        content = CfgNode.load_yaml_with_base(str(path))
    except OSError as error:
        raise UserError(f"cannot read config {error.filename or path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"config {path} is not valid YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"config {path}: its _BASE_ leads back to itself") from error
    except (TypeError, AttributeError, AssertionError):  # from merging what are not mappings
        content = None
    if not isinstance(content, dict):
        raise UserError(f"config {path} (or its _BASE_) is not a mapping of sections")
    return content


def _pairs(opts: Sequence[str]) -> Iterable[tuple[str, str]]:
    if len(opts) % 2:
        raise UserError(f"options come as KEY VALUE pairs; {opts[-1]!r} is left without a value")
    return zip(opts[::2], opts[1::2], strict=True)


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one known leaf of `cfg`, drop an inert one, refuse anything else."""
    if any(key == name or key.startswith(f"{name}.") for name in INERT):
        return
    known = dict(leaves(_DEFAULTS))
    if key not in known:
        if value is None and any(name.startswith(f"{key}.") for name in known):
            return  # a section left empty in the file
        raise UserError(
            f"{source}: unknown key {key}; the nearest known one is {nearest(key, known)}"
        )
    section, _, name = key.rpartition(".")
    node = cfg
    for part in filter(None, section.split(".")):
        node = node[part]
    node[name] = _coerce(key, value, known[key], source)


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that is spelled most like `name`, regardless of case."""
    by_upper = {entry.upper(): entry for entry in known}
    return by_upper[difflib.get_close_matches(name.upper(), by_upper, n=1, cutoff=0.0)[0]]


def _coerce(key: str, value: Any, default: Any, source: str) -> Any:
    """`value` as the type of `default`, by Detectron2's rules, and two kindnesses beside them.

    Strings that are Python literals are read as such, and lists and tuples replace each other
    (Detectron2). An int is taken for a float, and one name for a list of datasets (ours).
    """
    if isinstance(value, str):
        literal = _literal(value)
        if isinstance(literal, str) or not isinstance(default, str):
            value = literal
    if key in ("DATASETS.TRAIN", "DATASETS.TEST") and isinstance(value, str) and value[:1] != "(":
        value = (value,)
    if type(value) is type(default) or default is None:
        return value
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return type(default)(value)
    if type(value) is int and isinstance(default, float):
        return float(value)
    raise UserError(
        f"{source}: {key} takes a {type(default).__name__} such as {default!r}, not {value!r}"
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
