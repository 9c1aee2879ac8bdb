"""The native engine against Detectron2 itself: one config, one state_dict, one seed, same numbers.

Runs where `detectron2` can be imported (its compiled part is not needed).
"""

import warnings

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_tools

pytest.importorskip("detectron2", reason="compares with Detectron2, which is not installed")

from detectron2.config import get_cfg
from detectron2.modeling import build_backbone as build_detectron2_backbone
from detectron2.modeling import build_model as build_detectron2
from detectron2.modeling import build_proposal_generator
from detectron2.modeling import build_roi_heads as build_detectron2_roi_heads
from detectron2.utils.events import EventStorage

from moco_det.native.modeling.backbones import build_backbone
from moco_det.native.modeling.meta_arch import build_model
from moco_det.native.modeling.roi_heads import build_roi_heads
from moco_det.native.modeling.rpn import build_rpn
from moco_det.parity.comparison import randomize_for_parity
from moco_det.plugin.extensions import add_moco_config
from moco_det.plugin.probe import detectron2_input, in_float32

warnings.filterwarnings("ignore", module="torch.functional")  # Detectron2's torch.meshgrid


MOCO_C4 = """
MODEL.RESNETS.NORM SyncBN MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.BACKBONE.FREEZE_AT 0
MODEL.ROI_HEADS.NAME Res5ROIHeadsExtraNorm MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 8
MODEL.PIXEL_STD [57.375,57.12,58.395]
"""
FPN = """
MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.RESNETS.OUT_FEATURES
['res2','res3','res4','res5'] MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']
MODEL.ANCHOR_GENERATOR.SIZES [[32],[64],[128],[256],[512]] MODEL.RPN.IN_FEATURES
['p2','p3','p4','p5','p6'] MODEL.ROI_HEADS.NAME StandardROIHeads MODEL.ROI_HEADS.IN_FEATURES
['p2','p3','p4','p5'] MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead
MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7 MODEL.ROI_BOX_HEAD.FC_DIM 128
MODEL.RPN.PRE_NMS_TOPK_TRAIN 300 MODEL.RPN.PRE_NMS_TOPK_TEST 200
"""
R18 = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 "
COMMON = """
MODEL.DEVICE cpu MODEL.ROI_HEADS.NUM_CLASSES 5 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.1 MODEL.RPN.POST_NMS_TOPK_TRAIN 200
MODEL.RPN.POST_NMS_TOPK_TEST 60
"""
CASES = {
    "R50-C4-extra-norm": MOCO_C4,
    "R18-FPN-BN": FPN + R18 + "MODEL.RESNETS.NORM BN MODEL.ROI_BOX_HEAD.NUM_FC 2",
    "R50-FPN-FrozenBN": FPN + "MODEL.ROI_BOX_HEAD.NUM_FC 2",
    # Every other option that both engines know, away from its default.
    "R18-FPN-options": FPN
    + R18
    + """MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 3 MODEL.FPN.NORM BN
    MODEL.ROI_BOX_HEAD.NORM GN MODEL.ROI_BOX_HEAD.NUM_CONV 1 MODEL.ROI_BOX_HEAD.CONV_DIM 64
    MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True
    MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA 0.5 MODEL.RPN.SMOOTH_L1_BETA 0.1
    MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT 2.0 MODEL.RPN.LOSS_WEIGHT 0.5
    MODEL.RPN.BBOX_REG_LOSS_WEIGHT 3.0 MODEL.PROPOSAL_GENERATOR.MIN_SIZE 4
    MODEL.ANCHOR_GENERATOR.OFFSET 0.5 MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 2
    MODEL.ROI_HEADS.PROPOSAL_APPEND_GT False TEST.DETECTIONS_PER_IMAGE 7""",
    "R50-C5-dilated": """MODEL.RESNETS.OUT_FEATURES ['res5'] MODEL.RESNETS.RES5_DILATION 2
    MODEL.RPN.IN_FEATURES ['res5'] MODEL.ROI_HEADS.IN_FEATURES ['res5'] MODEL.ROI_HEADS.NAME
    StandardROIHeads MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead MODEL.ROI_BOX_HEAD.NUM_FC 1
    MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 4""",
    "R50-DC5-reduced": """MODEL.BACKBONE.NAME build_resnet_dilated_c5_backbone
    MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM SyncBN MODEL.RESNETS.STRIDE_IN_1X1 False
    MODEL.RESNETS.OUT_FEATURES ['res5'] MODEL.RESNETS.RES5_DILATION 2 MODEL.RPN.IN_FEATURES ['c5']
    MODEL.ROI_HEADS.IN_FEATURES ['c5'] MODEL.ROI_HEADS.NAME StandardROIHeads
    MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead MODEL.ROI_BOX_HEAD.NUM_FC 2
    MODEL.ROI_BOX_HEAD.FC_DIM 64 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7""",
    "R50-C4-masks": MOCO_C4 + "MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.CONV_DIM 32",
    "R18-FPN-masks": FPN
    + R18
    + """MODEL.RESNETS.NORM BN MODEL.ROI_BOX_HEAD.NUM_FC 2 MODEL.MASK_ON True
    MODEL.ROI_MASK_HEAD.NUM_CONV 2 MODEL.ROI_MASK_HEAD.CONV_DIM 32
    MODEL.ROI_MASK_HEAD.NORM BN""",
    "R18-FPN-bit-masks-and-keypoints": FPN
    + R18
    + """MODEL.RESNETS.NORM BN MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.MASK_ON True
    MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK True INPUT.MASK_FORMAT bitmask
    MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 10
    MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO 2 MODEL.KEYPOINT_ON True
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,16)
    MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 4 MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT 2.0
    MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS False""",
    "R18-FPN-keypoints": FPN
    + R18
    + """MODEL.RESNETS.NORM BN MODEL.ROI_BOX_HEAD.NUM_FC 1 MODEL.KEYPOINT_ON True
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,) MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 4
    MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION 8""",
}


def make_cfg(options: str):
    cfg = get_cfg()
    add_moco_config(cfg)
    cfg.merge_from_list((COMMON + options).split())
    return cfg


GT_BOXES = [
    torch.tensor([[10.0, 12.0, 60.0, 70.0], [40.5, 8.25, 120.0, 90.0], [2.0, 2.0, 30.0, 34.0]]),
    torch.tensor([[5.0, 20.0, 110.0, 75.0]]),
]
GT_CLASSES = [torch.tensor([0, 3, 4]), torch.tensor([2])]
ORIGINAL = [(200, 260), (81, 120)]


POLYGONS = [
    [
        [np.array([10.0, 12.0, 60.0, 20.5, 55.25, 70.0, 22.0, 60.0])],
        [np.array([40.5, 8.25, 80.0, 8.25, 60.0, 90.0]), np.array([90.0, 30, 120, 30, 120, 75.5])],
        [np.array([2.0, 2.0, 30.0, 2.0, 30.0, 34.0, 2.0, 34.0])],
    ],
    [[np.array([5.0, 40.0, 60.0, 20.0, 110.0, 45.0, 60.0, 75.0])]],
]


def bit_masks(polygons, size):
    """As tests/golden draws them: by the COCO API, at the size of the image."""
    shapes = [mask_tools.merge(mask_tools.frPyObjects(parts, *size)) for parts in polygons]
    masks = [torch.from_numpy(mask_tools.decode(shape)).bool() for shape in shapes]
    return torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool)


def keypoints_in(boxes, image):
    """Four for each box: visible, hidden, not labelled, and outside the box."""
    generator = torch.Generator().manual_seed(image)
    share = torch.rand((len(boxes), 4, 2), generator=generator)
    share[:, 3] = torch.tensor([1.5, 0.5])
    corner, opposite = boxes[:, None].split([2, 2], dim=2)
    points = corner + share * (opposite - corner)
    visibility = torch.tensor([2.0, 1.0, 0.0, 2.0])[:, None].expand(len(boxes), 4, 1)
    return torch.cat([points, visibility], dim=2) * (visibility > 0)


def native_batch(images, cfg, objects=True):
    """Training inputs with all kinds of ground truth; without `objects`, with none of any."""
    batch = []
    for index, (image, (height, width)) in enumerate(zip(images, ORIGINAL, strict=True)):
        count = len(GT_BOXES[index]) if objects else 0
        boxes, polygons = GT_BOXES[index][:count], POLYGONS[index][:count]
        as_bits = cfg.INPUT.MASK_FORMAT == "bitmask"
        batch.append(
            {
                "image": image,
                "gt_boxes": boxes,
                "gt_classes": GT_CLASSES[index][:count],
                "gt_masks": bit_masks(polygons, image.shape[1:]) if as_bits else polygons,
                "gt_keypoints": keypoints_in(boxes, index),
                "height": height,
                "width": width,
            }
        )
    return batch


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(2)
    sizes = [(96, 128), (81, 120)]  # they need padding, for the batch and for the FPN
    return [torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]


@pytest.fixture(scope="module", params=CASES)
def cfg(request):
    return make_cfg(CASES[request.param])


@pytest.fixture(scope="module")
def batch(images, cfg):
    return native_batch(images, cfg)


@pytest.fixture(scope="module")
def pair(cfg, batch):
    """(Detectron2's model, the native one) with the same weights; both are left in train mode."""
    torch.manual_seed(0)
    theirs, ours = build_detectron2(cfg), build_model(cfg)
    randomize_for_parity(ours, batch, ours.state_dict(), seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.proposal_generator.rpn_head.register_forward_hook(in_float32)
    return theirs, ours


def assert_close(ours, theirs, what: str, least=1e-12) -> None:
    """Equal shapes, and differences below 1e-4 of the largest value, which counts as `least`."""
    assert ours.shape == theirs.shape, what
    if theirs.numel():
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)
        assert error < 1e-4, f"{what}: relative error {error:.2g}"


def assert_close_gradients(ours, theirs) -> None:
    """Each but the exact zeros by itself.

    The gradient of a bias before a softmax or a batch normalisation is 0, and what float64 leaves
    of it is rounding: 1e-16 of the gradient of its layer's weight, give or take three digits.
    """
    assert list(ours) == list(theirs)
    largest = {}
    for name, gradient in theirs.items():
        layer = name.rpartition(".")[0]
        largest[layer] = max(largest.get(layer, 0.0), gradient.abs().max().item())
    for name, gradient in theirs.items():
        least = max(1e-12, 1e-6 * largest[name.rpartition(".")[0]])
        assert_close(ours[name], gradient, f"gradient of {name}", least)


def as_detectron2(batch):
    return [detectron2_input(item) for item in batch]


def run_training(model, batch, seed=0):
    """Losses, gradients and running statistics of a pass; the model is put back.

    Gradients in float64: in float32 rounding decides on which side of a ReLU some values lie.
    """
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.zero_grad()
    with EventStorage():
        torch.manual_seed(seed)
        with torch.no_grad():
            losses = model(batch)
        after = {k: v.clone() for k, v in model.state_dict().items()}
        model.double().load_state_dict(before)
        model.proposal_generator.anchor_generator.float()
        torch.manual_seed(seed)
        sum(model(batch).values()).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.float().load_state_dict(before)
    return losses, gradients, after


def test_trainable_parameters(pair):
    """In the same order, too: optimizer states go by position."""
    theirs, ours = ([(k, p.requires_grad) for k, p in m.named_parameters()] for m in pair)
    assert ours == theirs


def test_features_rpn_outputs_and_proposals(pair, images, batch):
    theirs, ours = (m.eval() for m in pair)
    with torch.no_grad():
        image_list = theirs.preprocess_image(as_detectron2(batch))
        padded, sizes = ours.preprocess(batch)
        assert_close(padded, image_list.tensor, "normalised images")
        expected, features = theirs.backbone(image_list.tensor), ours.backbone(padded)
        assert set(features) == set(expected)
        for name in expected:
            assert_close(features[name], expected[name], name)

        names = theirs.proposal_generator.in_features
        outputs = [m.proposal_generator.rpn_head([expected[n] for n in names]) for m in pair]
        for theirs_out, ours_out in zip(*outputs, strict=True):
            for name, a, b in zip(names, ours_out, theirs_out, strict=True):
                assert_close(a, b, f"RPN head on {name}")

        instances, _ = theirs.proposal_generator(image_list, expected, None)
        proposals, _ = ours.proposal_generator(features, sizes)
    for found, instance in zip(proposals, instances, strict=True):
        assert len(found) > 20
        assert_close(found, instance.proposal_boxes.tensor, "proposals")


def test_losses_gradients_and_running_statistics(pair, batch):
    theirs, ours = pair
    expected, expected_grads, expected_state = run_training(theirs, as_detectron2(batch))
    losses, grads, state = run_training(ours, batch)
    assert list(losses) == list(expected)
    for name in expected:
        assert expected[name] > 1e-3
        assert_close(losses[name], expected[name], name)
    assert_close_gradients(grads, expected_grads)
    for name in state:
        if name.endswith(("running_mean", "running_var")):
            assert_close(state[name], expected_state[name], name)


def test_losses_without_ground_truth(pair, images, cfg):
    none = native_batch(images, cfg, objects=False)
    expected, _, _ = run_training(pair[0], as_detectron2(none))
    losses, grads, _ = run_training(pair[1], none)
    for name in expected:
        assert_close(losses[name], expected[name], name)
    of_objects = {"loss_box_reg", "loss_rpn_loc", "loss_mask", "loss_keypoint"} & losses.keys()
    assert all(losses[name] == 0 for name in of_objects)
    trained = {name for name, p in pair[1].named_parameters() if p.requires_grad}
    assert grads.keys() == trained  # all of them: DistributedDataParallel waits for each
    assert all(g.isfinite().all() for g in grads.values())


def test_detections(pair, batch):
    theirs, ours = (m.eval() for m in pair)
    with torch.no_grad():
        expected = [x["instances"] for x in theirs(as_detectron2(batch))]
        detections = ours(batch)
    for found, instances in zip(detections, expected, strict=True):
        assert len(instances) > 3
        boxes, scores = instances.pred_boxes.tensor, instances.scores
        assert_close(found["scores"], scores, "scores")
        # Scores equal but for rounding may have changed places.
        rows = torch.cat([boxes, instances.pred_classes[:, None]], dim=1)
        ours = torch.cat([found["boxes"], found["classes"][:, None]], dim=1)
        partner = torch.cdist(rows, ours).argmin(dim=1)
        assert partner.unique().numel() == len(rows)
        found = {key: value[partner] for key, value in found.items()}
        assert_close(found["boxes"], boxes, "boxes")
        assert_close(found["scores"], scores, "scores")
        assert torch.equal(found["classes"], instances.pred_classes)
        assert ("masks" in found) == instances.has("pred_masks")
        assert ("keypoints" in found) == instances.has("pred_keypoints")
        if "masks" in found:
            assert found["masks"].shape == instances.pred_masks.shape
            different = found["masks"] != instances.pred_masks
            # Rounding decides where the probability is a half.
            assert different.sum() <= 1e-4 * instances.pred_masks.sum()
            assert 0 < instances.pred_masks.float().mean() < 1
        if "keypoints" in found:
            points, keypoint_scores = instances.pred_keypoints.split([2, 1], dim=2)
            assert_close(found["keypoints"][..., :2], points, "keypoints")
            assert_close(found["keypoints"][..., 2:], keypoint_scores, "keypoint scores")


@pytest.mark.parametrize("case", CASES)
def test_initialisation_from_one_seed(case):
    """Same distributions, drawn in the same order: the very same numbers."""
    cfg = make_cfg(CASES[case])
    backbone = build_backbone(cfg)
    shape = build_detectron2_backbone(cfg).output_shape()
    builders = {
        "backbone": (lambda: build_detectron2_backbone(cfg), lambda: build_backbone(cfg)),
        "rpn": (lambda: build_proposal_generator(cfg, shape), lambda: build_rpn(cfg, backbone)),
        "roi_heads": (
            lambda: build_detectron2_roi_heads(cfg, shape),
            lambda: build_roi_heads(cfg, backbone),
        ),
    }
    for part, builds in builders.items():
        states = []
        for build in builds:
            torch.manual_seed(7)
            states.append(build().state_dict())
        assert list(states[1]) == list(states[0]), part
        for name in states[0]:
            assert torch.equal(states[1][name], states[0][name]), name
