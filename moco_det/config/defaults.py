"""Every key of the configuration, with its default, and what the native engine makes of it."""

from typing import Any

# Keys that Detectron2 does not have (dotted names); the plugin adds them to its config.
OUR_KEYS = ("SOLVER.GRADIENT_ACCUMULATION_STEPS", "INPUT.RANDOM_SCALE")

# Keys and sections of Detectron2's DensePose project, which Detectron2 itself does not have either.
DENSEPOSE_KEYS = ("MODEL.DENSEPOSE_ON", "MODEL.ROI_DENSEPOSE_HEAD", "INPUT.ROTATION_ANGLES")

_MODEL = {
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    "DENSEPOSE_ON": False,  # True in the DensePose project, all of whose models have it
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
    "ROI_MASK_HEAD": {
        "NAME": "MaskRCNNConvUpsampleHead",
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NORM": "",
        "CLS_AGNOSTIC_MASK": False,
    },
    "ROI_KEYPOINT_HEAD": {
        "NAME": "KRCNNConvDeconvUpsampleHead",
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        "CONV_DIMS": (512,) * 8,
        "NUM_KEYPOINTS": 17,
        "MIN_KEYPOINTS_PER_IMAGE": 1,  # images with fewer labelled ones are not trained on
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
        "LOSS_WEIGHT": 1.0,
    },
    "ROI_DENSEPOSE_HEAD": {
        "NAME": "",
        "NUM_STACKED_CONVS": 8,
        "NUM_PATCHES": 24,  # charts of the body's surface
        "DECONV_KERNEL": 4,
        "CONV_HEAD_DIM": 512,
        "CONV_HEAD_KERNEL": 3,
        "UP_SCALE": 2,
        "HEATMAP_SIZE": 112,  # side of what is predicted for a region
        "POOLER_TYPE": "ROIAlignV2",
        "POOLER_RESOLUTION": 28,
        "POOLER_SAMPLING_RATIO": 2,
        "NUM_COARSE_SEGM_CHANNELS": 2,  # person or not; 15: 14 parts of the body or not
        "FG_IOU_THRESHOLD": 0.7,  # overlap above which a region is trained on
        "INDEX_WEIGHTS": 5.0,  # of the loss of the coarse segmentation
        "PART_WEIGHTS": 1.0,  # of the charts'
        "POINT_REGRESSION_WEIGHTS": 0.01,  # of those of U and V
        "COARSE_SEGM_TRAINED_BY_MASKS": False,
        "DECODER_ON": True,  # the native engine has none, and wants False
        "PREDICTOR_NAME": "DensePoseChartWithConfidencePredictor",
        "LOSS_NAME": "DensePoseChartWithConfidenceLoss",
        "UV_CONFIDENCE": {"ENABLED": False},
        "SEGM_CONFIDENCE": {"ENABLED": False},
    },
    "SEM_SEG_HEAD": {
        "NAME": "SemSegFPNHead",  # the native engine has FCN16Head only
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "IGNORE_VALUE": 255,  # of the label maps: takes no part in the loss
        "NUM_CLASSES": 54,
        "CONVS_DIM": 128,
        "COMMON_STRIDE": 4,
        "NORM": "GN",
        "LOSS_WEIGHT": 1.0,
    },
}

_INPUT = {
    "MIN_SIZE_TRAIN": (800,),
    "MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MAX_SIZE_TRAIN": 1333,
    "MIN_SIZE_TEST": 800,  # 0: no resizing
    "MAX_SIZE_TEST": 1333,
    "RANDOM_FLIP": "horizontal",
    # (smallest, largest) factor of the image's own size, drawn uniformly; () for none. Replaces
    # MIN_SIZE_TRAIN and MAX_SIZE_TRAIN (semantic segmentation).
    "RANDOM_SCALE": (),
    "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
    "FORMAT": "BGR",
    "MASK_FORMAT": "polygon",
    "ROTATION_ANGLES": [0],  # the DensePose project's
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
    "KEYPOINT_OKS_SIGMAS": [],  # one per keypoint; [] for those of COCO's persons
    "AUG": {"ENABLED": False},
    "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}

DEFAULTS = {
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
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "SemanticSegmentor"),
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
    "MODEL.ROI_HEADS.NAME": (
        "Res5ROIHeads",
        "Res5ROIHeadsExtraNorm",
        "StandardROIHeads",
        "DensePoseROIHeads",
    ),
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead",),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    # The first is the DensePose project's default, which nothing builds without DENSEPOSE_ON.
    "MODEL.ROI_DENSEPOSE_HEAD.NAME": ("", "DensePoseV1ConvXHead"),
    "MODEL.ROI_DENSEPOSE_HEAD.NUM_PATCHES": (24,),
    "MODEL.ROI_DENSEPOSE_HEAD.NUM_COARSE_SEGM_CHANNELS": (2, 15),
    "MODEL.ROI_DENSEPOSE_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_DENSEPOSE_HEAD.COARSE_SEGM_TRAINED_BY_MASKS": (False,),
    # Without confidences both names of a pair mean the same.
    "MODEL.ROI_DENSEPOSE_HEAD.PREDICTOR_NAME": (
        "DensePoseChartWithConfidencePredictor",
        "DensePoseChartPredictor",
    ),
    "MODEL.ROI_DENSEPOSE_HEAD.LOSS_NAME": (
        "DensePoseChartWithConfidenceLoss",
        "DensePoseChartLoss",
    ),
    "MODEL.ROI_DENSEPOSE_HEAD.UV_CONFIDENCE.ENABLED": (False,),
    "MODEL.ROI_DENSEPOSE_HEAD.SEGM_CONFIDENCE.ENABLED": (False,),
    # The first is Detectron2's default, which nothing builds unless SemanticSegmentor is asked for.
    "MODEL.SEM_SEG_HEAD.NAME": ("SemSegFPNHead", "FCN16Head"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "absolute"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.ROTATION_ANGLES": ([0],),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.RESCALE_INTERVAL": (False,),
    "TEST.AUG.ENABLED": (False,),
    "FLOAT32_PRECISION": ("",),
    "VIS_PERIOD": (0,),
}

# Detectron2's keys and sections that act only when something that `SUPPORTED` refuses is asked for.
INERT = (
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.RETINANET",
    "MODEL.PANOPTIC_FPN",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ANCHOR_GENERATOR.ANGLES",
    "MODEL.RESNETS.DEFORM_MODULATED",
    "MODEL.RESNETS.DEFORM_NUM_GROUPS",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "SOLVER.NUM_DECAYS",
    "TEST.AUG.MIN_SIZES",
    "TEST.AUG.MAX_SIZE",
    "TEST.AUG.FLIP",
    "GLOBAL",
)

# Likewise of the DensePose project.
DENSEPOSE_INERT = (
    "MODEL.ROI_DENSEPOSE_HEAD.CSE",
    "MODEL.ROI_DENSEPOSE_HEAD.DEEPLAB",
    "MODEL.ROI_DENSEPOSE_HEAD.DECODER_NUM_CLASSES",
    "MODEL.ROI_DENSEPOSE_HEAD.DECODER_CONV_DIMS",
    "MODEL.ROI_DENSEPOSE_HEAD.DECODER_NORM",
    "MODEL.ROI_DENSEPOSE_HEAD.DECODER_COMMON_STRIDE",
    "MODEL.ROI_DENSEPOSE_HEAD.UV_CONFIDENCE.EPSILON",
    "MODEL.ROI_DENSEPOSE_HEAD.UV_CONFIDENCE.TYPE",
    "MODEL.ROI_DENSEPOSE_HEAD.SEGM_CONFIDENCE.EPSILON",
    "MODEL.HRNET",
    "TEST.AUG.ROTATION_ANGLES",
    "BOOTSTRAP_MODEL",
)
