"""What MODEL.META_ARCHITECTURE means for the rest of a config, in either engine."""

from collections.abc import Mapping

from moco_det.common.errors import UserError
from moco_det.datasets import Dataset, get_dataset
from moco_det.datasets.semantic import IGNORED
from moco_det.densepose import files as densepose_files

SEMANTIC = "SemanticSegmentor"


def is_semantic(cfg) -> bool:
    """Whether the model labels pixels, not objects."""
    return cfg.MODEL.META_ARCHITECTURE == SEMANTIC


def num_classes_key(cfg) -> str:
    """The key that says how many classes the model tells apart."""
    section = "SEM_SEG_HEAD" if is_semantic(cfg) else "ROI_HEADS"
    return f"MODEL.{section}.NUM_CLASSES"


def num_classes(cfg) -> int:
    return (cfg.MODEL.SEM_SEG_HEAD if is_semantic(cfg) else cfg.MODEL.ROI_HEADS).NUM_CLASSES


def check_dataset(cfg, dataset: Dataset) -> None:
    """UserError unless `dataset` has what the model learns, and as many classes as it."""
    labelled = dataset.evaluator == "sem_seg"
    if labelled != is_semantic(cfg):
        has, learns = ("label maps", "objects") if labelled else ("objects", "label maps")
        raise UserError(
            f"dataset {dataset.name} has {has}, but MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE} learns from {learns}"
        )
    if cfg.MODEL.DENSEPOSE_ON and dataset.evaluator != "densepose":
        raise UserError(
            f"dataset {dataset.name} has no dense pose, but MODEL.DENSEPOSE_ON is True: take "
            "densepose_coco_2014_*, densepose:ANNOTATIONS.json:IMAGE_DIR, or set it to False"
        )
    classes = dataset.classes
    if len(classes) != num_classes(cfg):
        raise UserError(
            f"{num_classes_key(cfg)} is {num_classes(cfg)}, but {dataset.name} has {len(classes)} "
            f"classes ({', '.join(classes[:30])}): set it to {len(classes)}"
        )


def check_metric_files(cfg) -> None:
    """UserError where files lack that scoring DATASETS.TEST needs: before the hours of a run."""
    for name in cfg.DATASETS.TEST if cfg.MODEL.DENSEPOSE_ON else ():
        if get_dataset(name).evaluator == "densepose":
            densepose_files.require(densepose_files.GEODESICS, f"the metric of {name}")


def check_input(cfg, crops_objects: bool) -> None:
    """UserError where keys say of the training input what is not done for the model's task.

    Args:
        crops_objects: whether the engine knows INPUT.CROP for detectors too. Neither knows
            INPUT.RANDOM_SCALE for them; Detectron2 would train without it, in silence.
    """
    if is_semantic(cfg):
        _check_semantic_input(cfg)
    elif cfg.INPUT.RANDOM_SCALE:
        raise UserError(
            f"INPUT.RANDOM_SCALE {tuple(cfg.INPUT.RANDOM_SCALE)} is for {SEMANTIC} only: set it to "
            "() and use INPUT.MIN_SIZE_TRAIN"
        )
    elif cfg.INPUT.CROP.ENABLED and not crops_objects:
        raise UserError(
            f"INPUT.CROP.ENABLED is True: the native engine crops for {SEMANTIC} only; set it to "
            "False, or use --engine detectron2"
        )


def _check_semantic_input(cfg) -> None:
    scale, crop = tuple(cfg.INPUT.RANDOM_SCALE), cfg.INPUT.CROP
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        raise UserError(f"INPUT.RANDOM_SCALE is {scale}: set it to () or (smallest, largest)")
    if crop.ENABLED and crop.TYPE != "absolute":
        raise UserError(f"INPUT.CROP.TYPE is {crop.TYPE!r}: {SEMANTIC} takes 'absolute' crops only")
    if crop.ENABLED and not (
        len(crop.SIZE) == 2 and all(isinstance(side, int) and side > 0 for side in crop.SIZE)
    ):
        raise UserError(f"INPUT.CROP.SIZE is {crop.SIZE}: set it to [height, width] in pixels")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}, which counts annotated "
            f"objects: {SEMANTIC} takes TrainingSampler only"
        )
    if cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE != IGNORED:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE}: label maps "
            f"are read with {IGNORED} for what is ignored"
        )


def semantic_feature(cfg, strides: Mapping[str, int]) -> str:
    """The feature map that FCN16Head works on.

    Args:
        strides: of the backbone's feature maps, by name.

    Raises:
        UserError: MODEL.SEM_SEG_HEAD does not name one of them, and the stride that it has.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    if len(head.IN_FEATURES) != 1 or head.IN_FEATURES[0] not in strides:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {list(head.IN_FEATURES)}: FCN16Head takes one of "
            f"the backbone's features {list(strides)} (MODEL.RESNETS.OUT_FEATURES)"
        )
    (name,) = head.IN_FEATURES
    if strides[name] != head.COMMON_STRIDE:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {head.COMMON_STRIDE}, but {name} has stride "
            f"{strides[name]}: FCN16Head needs them equal; res5 has stride 16 with "
            "MODEL.RESNETS.RES5_DILATION 2"
        )
    return name
