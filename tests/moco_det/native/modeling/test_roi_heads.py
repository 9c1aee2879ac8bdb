"""How the heads of the two layouts get their features and what they are trained on."""

import pytest
import torch

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.densepose.points import DensePosePoints
from moco_det.native.modeling.boxes import Targets
from moco_det.native.modeling.densepose_head import DensePoseChartLoss, select_with_densepose
from moco_det.native.modeling.pooling import ROIPooler
from moco_det.native.modeling.roi_heads import Res5ROIHeads, build_res5, build_roi_heads


def boxes_near(centre: float, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = centre + 20 * torch.rand(n, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 40 * torch.rand(n, 2, generator=generator)], dim=1)


def test_extra_norm_of_moco_follows_res5():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    plain, extra = (build_res5(cfg, extra_norm=flag) for flag in (False, True))
    assert set(extra.state_dict()) - set(plain.state_dict()) == {
        f"norm.{k}"
        for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    pooled = torch.randn(6, 64, 6, 6)
    out = extra(pooled)
    assert out.shape == (6, 128, 3, 3)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(128), rtol=0, atol=1e-4)
    assert out.min() < 0  # nothing rectifies it


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_convolving_before_pooling_changes_nothing(stride_in_1x1):
    """The oracle is the definition: pool each region, then run res5 on it."""
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = "BN", stride_in_1x1
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    res5 = build_res5(cfg, extra_norm=True).double()  # in float32 a ReLU may take another side
    pooler = ROIPooler(6, [16], sampling_ratio=0)
    heads = Res5ROIHeads(
        res5=res5, box_predictor=None, in_features=["res4"], sampler=None, pooler=pooler
    )
    maps, boxes = [torch.randn(2, 64, 9, 7).double()], [boxes_near(50, 12, 0), boxes_near(70, 8, 1)]

    def gradients(features):
        res5.zero_grad()
        features.square().sum().backward()
        return [p.grad.clone() for p in res5.parameters()]

    found = heads.box_features(maps, boxes)
    expected = res5(pooler(maps, boxes)).mean(dim=(2, 3))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


class Backbone(torch.nn.Module):
    """What the heads want to know of one."""

    def __init__(self, channels, strides):
        super().__init__()
        self.channels, self.strides = channels, strides


def small_cfg(name, *options):
    """Narrow heads without BN, so that a region's numbers do not depend on the other regions."""
    cfg = get_cfg()
    keys = {
        "RESNETS.RES2_OUT_CHANNELS": 16,
        "RESNETS.WIDTH_PER_GROUP": 4,
        "ROI_HEADS.NAME": name,
        "ROI_HEADS.NUM_CLASSES": 2,
        "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
        "ROI_BOX_HEAD.NUM_FC": 1,
        "ROI_BOX_HEAD.FC_DIM": 8,
        "ROI_MASK_HEAD.CONV_DIM": 8,
        "ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
        "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
        "MASK_ON": True,
    }
    cfg.merge_from_list([x for key, value in keys.items() for x in (f"MODEL.{key}", value)])
    cfg.merge_from_list(list(options))
    return cfg


def small_heads(name, *options):
    torch.manual_seed(0)
    maps = {"res4": 64, "p2": 5, "p3": 5}
    backbone = Backbone(maps, {"res4": 16, "p2": 4, "p3": 8})
    heads = build_roi_heads(small_cfg(name, *options), backbone)
    for predictor in (heads.mask_head.predictor, heads.box_predictor.cls_score):
        torch.nn.init.normal_(predictor.weight)
    features = {
        name: torch.randn(2, channels, 112 // stride, 96 // stride)
        for (name, channels), stride in zip(maps.items(), backbone.strides.values(), strict=True)
    }
    return heads, features


FPN = ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"], "MODEL.KEYPOINT_ON", True)
SIZES = [(110, 90), (100, 96)]
PROPOSALS = [boxes_near(5, 20, 0), boxes_near(25, 12, 1)]


def ground_truth():
    """Two objects and one: triangles in their boxes, and one labelled keypoint of three."""
    boxes = [PROPOSALS[0][:2] + 1, PROPOSALS[1][:1] - 1]
    triangle = [0, 1, 2, 1, 0, 3]  # upper left, upper right, lower left
    masks = [[[box.double().numpy()[triangle]] for box in of_image] for of_image in boxes]
    keypoints = [torch.zeros(len(of_image), 3, 3) for of_image in boxes]
    for of_image, points in zip(boxes, keypoints, strict=True):
        points[:, 1, :2], points[:, 1, 2] = of_image[:, :2] + 3, 2
    return Targets(boxes, [torch.tensor([0, 1]), torch.tensor([1])], masks, keypoints)


@pytest.mark.usefixtures("float64")
def test_c4_masks_are_trained_on_the_foreground_s_positions():
    """The oracle pools the foreground regions by themselves and runs res5 on them."""
    heads, features = small_heads("Res5ROIHeadsExtraNorm")
    heads.res5.norm.running_mean.fill_(1.0)
    torch.manual_seed(1)
    detections, losses = heads(features, SIZES, PROPOSALS, ground_truth())
    assert detections == []
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_mask"]
    torch.manual_seed(1)
    samples = heads.sampler(PROPOSALS, ground_truth())
    foreground = samples.where(samples.classes < 2)
    assert 3 <= len(foreground.classes) < len(samples.classes)
    pooled = heads.res5(heads.pooler([features["res4"]], foreground.boxes))
    assert pooled.shape[1:] == (128, 3, 3)
    assert pooled.min() < 0  # the extra norm is part of it
    expected = heads.mask_head.losses(pooled, foreground, ground_truth().masks)
    torch.testing.assert_close(losses["loss_mask"], expected["loss_mask"])


@pytest.mark.usefixtures("float64")
def test_fpn_heads_are_trained_on_foreground_of_their_own_resolution():
    heads, features = small_heads("StandardROIHeads", *FPN)
    torch.manual_seed(1)
    _, losses = heads(features, SIZES, PROPOSALS, ground_truth())
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint"]
    torch.manual_seed(1)
    samples = heads.sampler(PROPOSALS, ground_truth())
    foreground = samples.where(samples.classes < 2)
    maps, truth = [features["p2"], features["p3"]], ground_truth()
    pooled = ROIPooler(14, [4, 8], sampling_ratio=0)(maps, foreground.boxes)
    expected = heads.mask_head.losses(pooled, foreground, truth.masks)
    expected |= heads.keypoint_head.losses(pooled, foreground, truth.keypoints)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "options"), [("Res5ROIHeads", ()), ("StandardROIHeads", FPN)], ids=["C4", "FPN"]
)
def test_masks_and_keypoints_are_those_of_the_boxes_found(name, options):
    """Each detection's, asked for one by one."""
    heads, features = small_heads(name, *options)
    with torch.no_grad():
        found, losses = heads.eval()(features, SIZES, PROPOSALS)
        assert losses == {}
        counts = [len(x["boxes"]) for x in found]
        assert counts[0] != counts[1] and min(counts) > 3
        for image, detections in enumerate(found):
            maps = [features[name][image : image + 1] for name in heads.in_features]
            rows = zip(detections["boxes"], detections["classes"], strict=True)
            for index, (box, label) in enumerate(rows):
                pooled = heads.mask_features(maps, [box[None]])
                (expected,) = heads.mask_head.predict(pooled, label[None])
                torch.testing.assert_close(detections["mask_probabilities"][index], expected)
                if heads.keypoint_head is not None:
                    pooled = heads.keypoint_pooler(maps, [box[None]])
                    (expected,) = heads.keypoint_head.predict(pooled, box[None])
                    torch.testing.assert_close(detections["keypoints"][index], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.KEYPOINT_ON", True), "KEYPOINT_ON True: .* 'Res5ROIHeads' find no keypoints"),
        (("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"]), "IN_FEATURES .* pool from one map"),
    ],
)
def test_what_a_c4_head_does_not_do_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        small_heads("Res5ROIHeads", *options)


DENSEPOSE = (
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"], "MODEL.DENSEPOSE_ON", True),
    *("MODEL.ROI_DENSEPOSE_HEAD.NAME", "DensePoseV1ConvXHead"),
    *("MODEL.ROI_DENSEPOSE_HEAD.DECODER_ON", False),
    *("MODEL.ROI_DENSEPOSE_HEAD.CONV_HEAD_DIM", 8),
    *("MODEL.ROI_DENSEPOSE_HEAD.NUM_STACKED_CONVS", 1),
    *("MODEL.ROI_DENSEPOSE_HEAD.POOLER_RESOLUTION", 5),
    *("MODEL.ROI_DENSEPOSE_HEAD.HEATMAP_SIZE", 20),
    *("MODEL.ROI_DENSEPOSE_HEAD.POOLER_TYPE", "ROIAlign"),
    *("MODEL.ROI_DENSEPOSE_HEAD.FG_IOU_THRESHOLD", 0.6),
)


def dense_pose(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y, u, v = torch.rand((4, 30), generator=generator)
    charts = torch.randint(25, (30,), generator=generator)
    parts = torch.randint(15, (256, 256), generator=generator, dtype=torch.uint8)
    return DensePosePoints(x * 256, y * 256, charts, u, v, parts)


@pytest.mark.usefixtures("float64")
def test_dense_pose_is_trained_on_foreground_that_fits_its_annotated_object():
    heads, features = small_heads("DensePoseROIHeads", *DENSEPOSE)
    truth = ground_truth()._replace(densepose=[[dense_pose(0), None], [dense_pose(1)]])
    torch.manual_seed(1)
    _, losses = heads(features, SIZES, PROPOSALS, truth)
    kinds = [f"loss_densepose_{kind}" for kind in "UVIS"]
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_mask", *kinds]
    torch.manual_seed(1)
    samples = heads.sampler(PROPOSALS, truth)
    foreground = samples.where(samples.classes < 2)
    posed = select_with_densepose(foreground, truth.densepose, 0.6)
    assert 2 <= len(posed.classes) < len(foreground.classes)
    maps = [features["p2"], features["p3"]]
    pooled = ROIPooler(5, [4, 8], sampling_ratio=2, aligned=False)(maps, posed.boxes)
    charts = heads.densepose_predictor(heads.densepose_head(pooled))
    expected = DensePoseChartLoss(5.0, 1.0, 0.01)(charts, posed, truth.densepose)
    for kind in kinds:
        assert expected[kind] > 0
        torch.testing.assert_close(losses[kind], expected[kind])


def test_no_dense_pose_in_a_batch_is_zero_with_gradients():
    heads, features = small_heads("DensePoseROIHeads", *DENSEPOSE)
    truth = ground_truth()._replace(densepose=[[None, None], [None]])
    _, losses = heads(features, SIZES, PROPOSALS, truth)
    of_pose = [loss for name, loss in losses.items() if "densepose" in name]
    assert [loss.item() for loss in of_pose] == [0, 0, 0, 0]
    sum(of_pose).backward()
    assert all(p.grad is not None for p in heads.densepose_head.parameters())
    assert all(p.grad is not None for p in heads.densepose_predictor.parameters())


@pytest.mark.usefixtures("float64")
def test_charts_are_those_of_the_boxes_found():
    heads, features = small_heads("DensePoseROIHeads", *DENSEPOSE)
    with torch.no_grad():
        found, _ = heads.eval()(features, SIZES, PROPOSALS)
        for image, detections in enumerate(found):
            maps = [features[name][image : image + 1] for name in heads.in_features]
            charts = detections["charts"]
            assert len(charts.u) == len(detections["boxes"]) > 0
            for index, box in enumerate(detections["boxes"]):
                expected = heads.charts(maps, [box[None]])
                torch.testing.assert_close(charts.fine[index], expected.fine[0])
                torch.testing.assert_close(charts.v[index], expected.v[0])


@pytest.mark.parametrize("name", ["StandardROIHeads", "Res5ROIHeads"])
def test_heads_without_dense_pose_refuse_it(name):
    with pytest.raises(UserError, match=f"{name}' know no dense pose; use 'DensePoseROIHeads'"):
        small_heads(name, *DENSEPOSE)
