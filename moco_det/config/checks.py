"""Whether the keys of a config fit each other, the data sets and the weights, in either engine.

All of it is asked before anything runs. What a key means often depends on
MODEL.META_ARCHITECTURE: a `SemanticSegmentor` labels pixels, a `DepthEstimator` says how far away
they are, every other model finds objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fvcore.common.config import CfgNode

from moco_det.common.errors import UserError, one_line
from moco_det.common.processes import print_on_main
from moco_det.config.loading import leaves
from moco_det.datasets import NOTHING, Dataset, Problems, Record, Wanted, get_dataset
from moco_det.datasets.dataset import check_images, learnable
from moco_det.datasets.semantic import IGNORED
from moco_det.densepose import body
from moco_det.evaluation import rehearse

SEMANTIC = "SemanticSegmentor"
DEPTH = "DepthEstimator"
DEPTH_HEAD = "FCNDepthHead"


def is_semantic(cfg) -> bool:
    """Whether the model labels pixels, not objects."""
    return cfg.MODEL.META_ARCHITECTURE == SEMANTIC


def is_depth(cfg) -> bool:
    """Whether the model predicts how far away each pixel is."""
    return cfg.MODEL.META_ARCHITECTURE == DEPTH


def is_per_pixel(cfg) -> bool:
    """Whether the model predicts something of every pixel, and knows no objects."""
    return is_semantic(cfg) or is_depth(cfg)


def num_classes_key(cfg) -> str:
    """The key that says how many classes the model tells apart."""
    section = "SEM_SEG_HEAD" if is_per_pixel(cfg) else "ROI_HEADS"
    return f"MODEL.{section}.NUM_CLASSES"


def num_classes(cfg) -> int:
    return (cfg.MODEL.SEM_SEG_HEAD if is_per_pixel(cfg) else cfg.MODEL.ROI_HEADS).NUM_CLASSES


# -- data sets ------------------------------------------------------------------------------------


def check_datasets(cfg) -> None:
    """UserError unless all data sets have the same classes, and the model as many as they."""
    datasets = [get_dataset(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    for dataset in datasets:
        first = datasets[0]
        if dataset.classes != first.classes:
            raise UserError(
                f"the data sets {first.name} ({', '.join(first.classes)}) and {dataset.name} "
                f"({', '.join(dataset.classes)}) have different classes: use sets that share them"
            )
        check_dataset(cfg, dataset)
        check_keypoints(cfg, dataset)


def check_keypoints(cfg, dataset: Dataset) -> None:
    """UserError unless `dataset` names as many keypoints as the model learns, where it does."""
    found, wanted = len(dataset.keypoint_names), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if cfg.MODEL.KEYPOINT_ON and found != wanted:
        raise UserError(
            f"dataset {dataset.name}: the annotations name {found} keypoints, "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {wanted}: set it to {found}, or "
            "MODEL.KEYPOINT_ON False"
        )


def check_dataset(cfg, dataset: Dataset) -> None:
    """UserError unless `dataset` has what the model learns, and as many classes as it."""
    has, learns = annotations_of(dataset.evaluator), learns_from(cfg)
    if has != learns:
        raise UserError(
            f"dataset {dataset.name} has {has}, but MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE} learns from {learns}"
        )
    if cfg.MODEL.DENSEPOSE_ON and dataset.evaluator != "densepose":
        raise UserError(
            f"dataset {dataset.name} has no dense pose, but MODEL.DENSEPOSE_ON is True: take "
            "densepose_coco_2014_*, densepose:ANNOTATIONS.json:IMAGE_DIR, or set it to False"
        )
    if not is_depth(cfg):
        check_class_count(cfg, dataset.name, dataset.classes)


def annotations_of(evaluator: str) -> str:
    """What a data set has, by its evaluator."""
    return {"sem_seg": "label maps", "depth": "depth maps"}.get(evaluator, "objects")


def learns_from(cfg) -> str:
    """What the model learns from, in the words of `annotations_of`."""
    kinds = {SEMANTIC: "label maps", DEPTH: "depth maps"}
    return kinds.get(cfg.MODEL.META_ARCHITECTURE, "objects")


def check_class_count(cfg, name: str, classes: Sequence[str]) -> None:
    """UserError unless data set `name` has as many classes as the model tells apart."""
    if len(classes) != num_classes(cfg):
        raise UserError(
            f"{num_classes_key(cfg)} is {num_classes(cfg)}, but {one_line(name, 110)} has "
            f"{len(classes)} classes ({one_line(', '.join(classes), 90)}): set it to {len(classes)}"
        )


def wanted_of(cfg) -> Wanted:
    """What the model learns from the annotations of objects."""
    if is_per_pixel(cfg):
        return NOTHING
    model = cfg.MODEL
    return Wanted(
        masks=model.MASK_ON,
        polygons=model.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon",
        keypoints=model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if model.KEYPOINT_ON else 0,
    )


def check_learnable(cfg, records: Sequence[Record], names: Sequence[str]) -> None:
    """UserError where no record of the data sets `names` has an object for the model to learn."""
    model = cfg.MODEL
    least = model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if model.KEYPOINT_ON else 0
    empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    learnable(records, names, empty, least, model.DENSEPOSE_ON)


def check_scoring(cfg, names: Sequence[str]) -> None:
    """UserError where these of DATASETS.TEST cannot be scored, tried on a few images of each."""
    for name in names:
        dataset = get_dataset(name)
        records = dataset.records()
        check_images(records, Problems())
        rehearse_scoring(cfg, dataset, records)


def rehearse_scoring(cfg, dataset: Dataset, records: Sequence[Record]) -> None:
    """UserError where one data set cannot be scored; see `rehearse`."""
    wanted = wanted_of(cfg)
    posed = cfg.MODEL.DENSEPOSE_ON and dataset.evaluator == "densepose"
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    rehearse(dataset, records, wanted.masks, wanted.keypoints, sigmas, dense_pose=posed)


def check_metric_files(cfg) -> None:
    """UserError where a file is missing that scoring DATASETS.TEST will need after training."""
    for name in cfg.DATASETS.TEST if cfg.MODEL.DENSEPOSE_ON else ():
        if get_dataset(name).evaluator == "densepose":
            body.require(body.GEODESICS, f"the metric of {name}")


# -- training input --------------------------------------------------------------------------------


# Keys of INPUT that only models of pixels know, and what turns each off.
_OF_PIXELS = {"RANDOM_SCALE": (), "SCALE_CHOICES": (), "FIXED_SIZE": (), "RANDOM_ROTATION": 0}


def check_input(cfg, crops_objects: bool) -> None:
    """UserError where a key of the training input is not supported for the model's task.

    Args:
        crops_objects: whether the engine knows INPUT.CROP for detectors too. Neither knows
            INPUT.RANDOM_SCALE and the like for them; Detectron2 would train without it, in silence.
    """
    if is_per_pixel(cfg):
        _check_scales(cfg)
        _check_frame(cfg)
        _check_crop(cfg)
        _check_pixel_head(cfg)
        return
    for key, off in _OF_PIXELS.items():
        value = cfg.INPUT[key]
        if value != off:
            value = tuple(value) if isinstance(off, tuple) else value
            instead = " and use INPUT.MIN_SIZE_TRAIN" if "SCALE" in key else ""
            raise UserError(f"INPUT.{key} {value} is for {SEMANTIC} only: set it to {off}{instead}")
    if cfg.INPUT.CROP.ENABLED and not crops_objects:
        raise UserError(
            f"INPUT.CROP.ENABLED is True: the native engine crops for {SEMANTIC} only; set it to "
            "False, or use --engine detectron2"
        )


def _check_scales(cfg) -> None:
    scale, choices = tuple(cfg.INPUT.RANDOM_SCALE), tuple(cfg.INPUT.SCALE_CHOICES)
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        raise UserError(f"INPUT.RANDOM_SCALE is {scale}: set it to () or (smallest, largest)")
    if scale and choices:
        raise UserError(
            f"INPUT.RANDOM_SCALE is {scale} and INPUT.SCALE_CHOICES {choices}: set one of them "
            "to ()"
        )


def _check_frame(cfg) -> None:
    size, crop = tuple(cfg.INPUT.FIXED_SIZE), cfg.INPUT.CROP
    if not size:
        if cfg.INPUT.RANDOM_ROTATION:
            raise UserError(
                f"INPUT.RANDOM_ROTATION is {cfg.INPUT.RANDOM_ROTATION:g}, which takes an "
                "INPUT.FIXED_SIZE (height, width) to turn in"
            )
        if is_depth(cfg):
            raise UserError(
                f"INPUT.FIXED_SIZE is (): set it to (height, width); {DEPTH} can tell depths only "
                "in images of one size"
            )
        return
    if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise UserError(f"INPUT.FIXED_SIZE is {size}: set it to () or (height, width) in pixels")
    if crop.ENABLED:
        raise UserError(f"INPUT.FIXED_SIZE is {size}: set INPUT.CROP.ENABLED False, or it to ()")


def _check_crop(cfg) -> None:
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.TYPE != "absolute":
        raise UserError(f"INPUT.CROP.TYPE is {crop.TYPE!r}: {SEMANTIC} takes 'absolute' crops only")
    if crop.ENABLED and not (
        len(crop.SIZE) == 2 and all(isinstance(side, int) and side > 0 for side in crop.SIZE)
    ):
        raise UserError(f"INPUT.CROP.SIZE is {crop.SIZE}: set it to [height, width] in pixels")


def _check_pixel_head(cfg) -> None:
    model, head = cfg.MODEL, cfg.MODEL.SEM_SEG_HEAD
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}, which counts annotated "
            f"objects: {model.META_ARCHITECTURE} takes TrainingSampler only"
        )
    if head.IGNORE_VALUE != IGNORED:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}: label maps "
            f"are read with {IGNORED} for what is ignored"
        )
    if (head.NAME == DEPTH_HEAD) != is_depth(cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE} and MODEL.SEM_SEG_HEAD.NAME "
            f"{head.NAME}: {DEPTH} and {DEPTH_HEAD} go together, and only they"
        )
    if is_depth(cfg) and head.NUM_CLASSES != 1:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}: {DEPTH_HEAD} predicts one "
            "number for each pixel; set it to 1"
        )


OPTIMIZERS = ("SGD", "Adam")


def check_solver(cfg) -> None:
    """UserError for an optimizer that there is not, or one that lacks what is asked of it."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: use {' or '.join(OPTIMIZERS)}")
    if solver.NESTEROV and solver.OPTIMIZER != "SGD":
        raise UserError(
            f"SOLVER.NESTEROV is True, which {solver.OPTIMIZER} does not have: set it to False, "
            "or SOLVER.OPTIMIZER SGD"
        )


# -- backbone and weights --------------------------------------------------------------------------


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


def semantic_feature(cfg, strides: Mapping[str, int]) -> str:
    """The feature map that FCN16Head or FCNDepthHead works on.

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


def check_weights(cfg: CfgNode, metadata: Mapping[str, object]) -> None:
    """Compare what a converted file needs (its entry "requires") with the config.

    Args:
        metadata: of MODEL.WEIGHTS, as `moco_det.common.weight_sources.read_state_dict` returns it.

    Raises:
        UserError: names every key of the config that contradicts the file.
    """
    values, requires = dict(leaves(cfg)), metadata.get("requires", {})
    if not isinstance(requires, Mapping):
        raise UserError(
            f"{cfg.MODEL.WEIGHTS}: its entry 'requires' is not a dict of config keys: convert again"
        )
    wrong = [
        f"{key} {needed} (the config says {values[key]})"
        for key, needed in requires.items()
        if key in values and not _equal(values[key], needed)
    ]
    if wrong:
        raise UserError(f"the weights in {cfg.MODEL.WEIGHTS} need {', '.join(wrong)}")


def _equal(value: object, needed: object) -> bool:
    if isinstance(needed, list) and isinstance(value, list) and len(value) == len(needed):
        try:
            return np.allclose(value, needed, rtol=1e-3)  # pixel values; configs round differently
        except TypeError:  # no numbers
            return False
    return value == needed


# -- how the images of one optimizer step are divided ----------------------------------------------

# MoCo v1, Sec. 4.2: Detectron2's recipe of 8 GPUs with 2 images each, BN synchronised over all.
PAPER_IMAGES = 16
PAPER_LR = 0.02
ADAM_IMAGES = 8  # of the recipes with Adam, which are those of arXiv:2106.05967


@dataclass(frozen=True)
class BatchPlan:
    """How `images`, the batch of one optimizer step, are divided.

    Args:
        images: over all processes and forward passes.
        processes: that share them.
        accumulation: forward passes whose gradients are added up for one step.
        norm: MODEL.RESNETS.NORM.
        paper_lr: that of the paper's recipe; None where it is each data set's own.
        paper_images: likewise `images`.
    """

    images: int
    processes: int
    accumulation: int
    norm: str
    paper_lr: float | None = PAPER_LR
    paper_images: int = PAPER_IMAGES

    @property
    def images_per_forward(self) -> int:
        """Images of one process in one forward pass."""
        return self.images // (self.processes * self.accumulation)

    @property
    def bn_group(self) -> int:
        """Images whose BN statistics are computed together; 0 where BN is frozen or absent."""
        synchronised = ("SyncBN", "naiveSyncBN")
        processes = self.processes if self.norm in synchronised else int(self.norm == "BN")
        return processes * self.images_per_forward

    def differences(self, lr: float) -> list[str]:
        """What differs from the paper's fine-tuning recipe, at this base learning rate."""
        found = []
        if self.paper_lr is not None:
            linear = self.paper_lr * self.images / self.paper_images
            if abs(lr - linear) > 1e-6 * linear:
                found.append(
                    f"learning rate {lr:g} (the paper's for {self.images} images would be "
                    f"{linear:g})"
                )
        paper = self.paper_images
        if self.images != paper:
            found.append(f"a step of {self.images} images (the paper: {paper})")
        if self.bn_group == 0:
            found.append(f"NORM {self.norm!r} (the paper: trained, synchronised BN)")
        elif self.bn_group != paper:
            found.append(f"BN statistics over {self.bn_group} images (the paper: {paper})")
        return found

    def describe(self, lr: float) -> str:
        """One line: the effective batch, the BN group, and what differs from the paper."""
        groups = f"BN over {self.bn_group} images" if self.bn_group else "no batch statistics"
        differences = "; ".join(self.differences(lr)) or "nothing"
        return (
            f"batch {self.images} = {self.processes} process(es) x {self.images_per_forward} "
            f"images x {self.accumulation} accumulated; {groups} ({self.norm or 'no norm'}); "
            f"not as in the paper: {differences}"
        )


def plan_batch(cfg, processes: int) -> BatchPlan:
    """The plan of a config (of either engine) on `processes` processes.

    Raises:
        UserError: the batch does not divide.
    """
    images, accumulation = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS
    parts = processes * accumulation
    if accumulation < 1 or images < 1 or images % parts:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {images} is the batch of one optimizer step: set it to a "
            f"multiple of {processes} process(es) x SOLVER.GRADIENT_ACCUMULATION_STEPS "
            f"{accumulation}"
        )
    # Of semantic segmentation 0.003 on VOC, 0.01 on Cityscapes (appendix A.5).
    paper_lr = None if is_per_pixel(cfg) else PAPER_LR
    paper_images = ADAM_IMAGES if cfg.SOLVER.OPTIMIZER == "Adam" else PAPER_IMAGES
    norm = cfg.MODEL.RESNETS.NORM
    return BatchPlan(images, processes, accumulation, norm, paper_lr, paper_images)


def scaled_to_processes(cfg, processes: int):
    """`cfg` with its recipe moved from SOLVER.REFERENCE_WORLD_SIZE processes to `processes`.

    Batch and learning rate grow with the processes, iterations and periods shrink, so that one
    process sees as many images per step as in the recipe (Detectron2's `auto_scale_workers`). Off,
    and `cfg` itself, where SOLVER.REFERENCE_WORLD_SIZE is 0.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return cfg
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} does not divide "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    solver, scale = cfg.SOLVER, processes / reference
    solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
    solver.BASE_LR *= scale
    solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)
    for section, key in (
        (solver, "MAX_ITER"),
        (solver, "WARMUP_ITERS"),
        (solver, "CHECKPOINT_PERIOD"),
        (cfg.TEST, "EVAL_PERIOD"),
    ):
        section[key] = round(section[key] / scale)
    solver.REFERENCE_WORLD_SIZE = processes
    print_on_main(
        f"recipe scaled to {processes} processes: batch {solver.IMS_PER_BATCH}, learning rate "
        f"{solver.BASE_LR:g}, {solver.MAX_ITER} iterations, steps {solver.STEPS}"
    )
    cfg.freeze()
    return cfg
