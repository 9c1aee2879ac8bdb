"""Record what Detectron2 computes, so that the native engine is held to it where it is absent.

    PYTHONPATH=DETECTRON2 python tests/golden/record_model.py

Weights and images come from numpy's RandomState, whose stream never changes, and every anchor and
proposal is sampled, so that no number depends on a version of torch.
"""

import zlib

import numpy as np
import torch
from recording import write

COMMON = """
MODEL.DEVICE cpu MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.ROI_HEADS.NUM_CLASSES 4
MODEL.RPN.BATCH_SIZE_PER_IMAGE 5000 MODEL.RPN.POSITIVE_FRACTION 1.0
MODEL.RPN.POST_NMS_TOPK_TRAIN 30 MODEL.RPN.POST_NMS_TOPK_TEST 30
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 100 MODEL.ROI_HEADS.POSITIVE_FRACTION 1.0
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.2 MODEL.PIXEL_STD [57.375,57.12,58.395]
"""
FPN = """
MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.RESNETS.OUT_FEATURES
['res2','res3','res4','res5'] MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']
MODEL.ANCHOR_GENERATOR.SIZES [[32],[64],[128],[256],[512]] MODEL.RPN.IN_FEATURES
['p2','p3','p4','p5','p6'] MODEL.ROI_HEADS.NAME StandardROIHeads MODEL.ROI_HEADS.IN_FEATURES
['p2','p3','p4','p5'] MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead MODEL.ROI_BOX_HEAD.NUM_FC 2
MODEL.ROI_BOX_HEAD.FC_DIM 64 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7
"""
R18_FPN = (
    FPN
    + """MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN
    MODEL.FPN.NORM BN MODEL.ROI_BOX_HEAD.NORM BN MODEL.ROI_BOX_HEAD.NUM_CONV 1
    MODEL.ROI_BOX_HEAD.CONV_DIM 32 """
)
MOCO_C4 = """MODEL.ROI_HEADS.NAME Res5ROIHeadsExtraNorm MODEL.RESNETS.NORM SyncBN
    MODEL.BACKBONE.FREEZE_AT 0 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 6 """
CASES = {
    "R50-C4-extra-norm": MOCO_C4,
    "R18-FPN": R18_FPN,
    "R50-FPN": FPN,
    "R50-C4-masks": MOCO_C4 + "MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.CONV_DIM 32",
    "R18-FPN-masks": R18_FPN
    + """MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.NUM_CONV 2 MODEL.ROI_MASK_HEAD.CONV_DIM 32
    MODEL.ROI_MASK_HEAD.NORM BN""",
    "R18-FPN-keypoints": R18_FPN
    + """MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,16)
    MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3""",
}
# Deviations of the predictors' weights with which there are proposals and detections to compare.
DEVIATIONS = {
    "objectness_logits": 0.05,
    "anchor_deltas": 0.01,
    "cls_score": 0.2,
    "bbox_pred": 0.2,
    "predictor": 1.0,  # of the mask head
    "score_lowres": 0.1,
}


def options(case: str) -> list[str]:
    """KEY VALUE pairs over the default config."""
    return (COMMON + CASES[case]).split()


def fill(model: torch.nn.Module) -> None:
    """Set every parameter and statistic from its name."""
    for name, value in model.state_dict().items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        layer = name.split(".")[-2]
        if not value.is_floating_point():
            continue
        if value.ndim > 1:
            deviation = DEVIATIONS.get(layer, (2 / value[0].numel()) ** 0.5)
            filled = random.standard_normal(tuple(value.shape)) * deviation
        elif name.endswith("norm.weight"):
            filled = random.uniform(0.6, 1.0, tuple(value.shape))
        elif name.endswith("norm.running_var"):
            filled = random.uniform(1.0, 2.0, tuple(value.shape))
        else:
            filled = random.uniform(-0.1, 0.1, tuple(value.shape))
        value.copy_(torch.from_numpy(filled))


def images() -> list[torch.Tensor]:
    random = np.random.RandomState(0)
    sizes = [(96, 128), (90, 70)]
    coarse = [random.randint(0, 256, (3, h // 8 + 1, w // 8 + 1)) for h, w in sizes]
    blocks = [
        np.kron(c, np.ones((8, 8)))[:, :h, :w] for c, (h, w) in zip(coarse, sizes, strict=True)
    ]
    return [torch.from_numpy(b.astype(np.uint8)) for b in blocks]


GT_BOXES = [
    torch.tensor([[10.0, 12.0, 60.0, 70.0], [40.5, 8.25, 120.0, 90.0]]),
    torch.tensor([[5.0, 20.0, 65.0, 75.0]]),
]
GT_CLASSES = [torch.tensor([0, 3]), torch.tensor([2])]
# The second object is in two parts.
GT_POLYGONS = [
    [
        [np.array([10.0, 12.0, 60.0, 20.5, 55.25, 70.0, 22.0, 60.0])],
        [
            np.array([40.5, 8.25, 80.0, 8.25, 60.0, 90.0]),
            np.array([90.0, 30.0, 120.0, 30.0, 120.0, 75.5, 90.0, 75.5]),
        ],
    ],
    [[np.array([5.0, 40.0, 30.0, 20.0, 65.0, 45.0, 30.0, 75.0])]],
]
GT_KEYPOINTS = [
    torch.tensor(
        [
            [[20.5, 30.5, 2.0], [0.0, 0.0, 0.0], [55.5, 65.5, 1.0]],
            [[120.0, 90.0, 2.0], [60.5, 40.5, 2.0], [90.5, 12.5, 2.0]],
        ]
    ),
    torch.tensor([[[30.5, 50.5, 1.0], [45.5, 22.5, 2.0], [0.0, 0.0, 0.0]]]),
]
ORIGINAL = [(192, 256), (45, 35)]


def summarise(losses: dict, detections: list[dict]) -> dict:
    """Losses, and the ten best detections of each image: what their fields are summarised to.

    A mask is held to its number of pixels in each quarter of the image.
    """
    return {
        "losses": {name: float(value) for name, value in losses.items()},
        "detections": [
            {"count": len(found["boxes"])}
            | {
                key: (quarters(value[:10]) if key == "masks" else value[:10]).tolist()
                for key, value in found.items()
            }
            for found in detections
        ],
    }


def quarters(masks: torch.Tensor) -> torch.Tensor:
    """(D, H, W) -> (D, 4): pixels at the upper left, upper right, lower left, lower right."""
    height, width = masks.shape[1] // 2, masks.shape[2] // 2
    parts = [(part[:, :, :width], part[:, :, width:]) for part in masks.tensor_split([height], 1)]
    return torch.stack([part.sum(dim=(1, 2)) for row in parts for part in row], dim=1)


def record_case(case: str) -> dict:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
    from detectron2.utils.events import EventStorage

    cfg = get_cfg()
    cfg.merge_from_list(options(case))
    model = build_model(cfg)
    fill(model)
    batch = []
    truth = zip(GT_BOXES, GT_CLASSES, GT_POLYGONS, GT_KEYPOINTS, ORIGINAL, strict=True)
    for image, (boxes, classes, polygons, keypoints, (h, w)) in zip(images(), truth, strict=True):
        instances = Instances(
            image.shape[1:],
            gt_boxes=Boxes(boxes),
            gt_classes=classes,
            gt_masks=PolygonMasks(polygons),
            gt_keypoints=Keypoints(keypoints),
        )
        batch.append({"image": image, "instances": instances, "height": h, "width": w})
    with torch.no_grad(), EventStorage():
        detections = [x["instances"] for x in model.eval()(batch)]
        losses = model.train()(batch)
    return summarise(losses, [native_names(x) for x in detections])


def native_names(instances) -> dict:
    """A detection's fields as the native engine calls them."""
    names = {"masks": "pred_masks", "keypoints": "pred_keypoints"}
    return {
        "boxes": instances.pred_boxes.tensor,
        "scores": instances.scores,
        "classes": instances.pred_classes,
    } | {ours: instances.get(theirs) for ours, theirs in names.items() if instances.has(theirs)}


def register_extra_norm() -> None:
    """The head of facebookresearch/moco's detection script."""
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

    @ROI_HEADS_REGISTRY.register()
    class Res5ROIHeadsExtraNorm(Res5ROIHeads):
        @classmethod
        def _build_res5_block(cls, cfg):
            res5, out_channels = super()._build_res5_block(cfg)
            res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, out_channels))
            return res5, out_channels


if __name__ == "__main__":
    register_extra_norm()
    write("model", {case: record_case(case) for case in CASES})
