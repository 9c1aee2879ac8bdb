"""The RPN against Detectron2's published numbers and against loops over anchors."""

import math

import pytest
import record_anchors
import torch
from recording import read
from tiny_voc import write_tiny_config
from torch import nn
from torchvision.ops import box_iou

from moco_det.common.errors import UserError
from moco_det.config.loading import load_config
from moco_det.native.modeling.backbones import ResNet
from moco_det.native.modeling.layers import kernels_of
from moco_det.native.modeling.meta_arch import build_model
from moco_det.native.modeling.rpn import RPN, AnchorGenerator, RPNHead, cell_anchors


def make_rpn(channels=8, sizes=((16,), (32,)), strides=(4, 8), **changes) -> RPN:
    generator = AnchorGenerator(sizes, [0.5, 1.0, 2.0], strides)
    settings = {
        "in_features": [f"p{i}" for i in range(len(strides))],
        "iou_thresholds": [0.3, 0.7],
        "iou_labels": [0, -1, 1],
        "batch_size_per_image": 32,
        "positive_fraction": 0.5,
        "box_weights": (1.0, 1.0, 1.0, 1.0),
        "smooth_l1_beta": 0.0,
        "loss_weights": {"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0},
        "pre_nms_topk": (60, 40),
        "post_nms_topk": (20, 10),
        "nms_thresh": 0.7,
        "min_box_size": 0.0,
    }
    return RPN(RPNHead(channels, generator.num_anchors), generator, **(settings | changes))


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    shapes = {"p0": (2, 8, 10, 12), "p1": (2, 8, 5, 6)}
    return {k: torch.randn(*s, generator=generator) for k, s in shapes.items()}


SIZES = [(40, 48), (36, 40)]
GT = [torch.tensor([[4.0, 4.0, 30.0, 28.0], [20.0, 10.0, 36.0, 26.0]]), torch.zeros(0, 4)]


def strong_head(rpn: RPN) -> RPN:
    """Random predictors large enough to move boxes, and to make them overlap."""
    torch.manual_seed(1)
    nn.init.normal_(rpn.rpn_head.conv.weight, std=0.1)
    nn.init.normal_(rpn.rpn_head.objectness_logits.weight, std=0.5)
    nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.1)
    return rpn


def flat_outputs(rpn: RPN, features) -> list[tuple]:
    """Per image, one (level, anchor, logit, deltas) for each anchor, in plain loops."""
    maps = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(maps)
    anchors = rpn.anchor_generator(maps)
    images = []
    for n in range(len(maps[0])):
        rows = []
        for level, (a, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            _, num, height, width = logit.shape
            for index in range(len(a)):
                y, x, k = index // (width * num), index // num % width, index % num
                assert y < height
                rows.append((level, a[index], logit[n, k, y, x], delta[n, 4 * k : 4 * k + 4, y, x]))
        images.append(rows)
    return images


def apply_deltas(anchor, deltas):
    x0, y0, x1, y1 = anchor.tolist()
    dx, dy, dw, dh = deltas.tolist()
    w, h = x1 - x0, y1 - y0
    x, y = x0 + w / 2 + dx * w, y0 + h / 2 + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def slow_proposals(rows, size, pre_nms, post_nms, threshold, min_size):
    kept = []
    for level in {row[0] for row in rows}:
        candidates = sorted((r for r in rows if r[0] == level), key=lambda r: -r[2])[:pre_nms]
        chosen = []
        for _, anchor, logit, deltas in candidates:
            box = apply_deltas(anchor, deltas)
            for i in range(4):
                box[i] = min(max(box[i], 0), size[1 - i % 2])
            if box[2] - box[0] <= min_size or box[3] - box[1] <= min_size:
                continue
            box = torch.tensor(box)
            if all(box_iou(box[None], other[None]) <= threshold for _, other in chosen):
                chosen.append((logit.item(), box))
        kept += chosen
    kept.sort(key=lambda item: -item[0])
    return torch.stack([box for _, box in kept[:post_nms]])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("min_box_size", [0.0, 12.0])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_proposals_equal_slow_rules(features, kind, training, min_box_size):
    rpn = strong_head(make_rpn(min_box_size=min_box_size)).train(training)
    with torch.no_grad(), kernels_of(kind):
        proposals, losses = rpn(features, SIZES, GT)
        rows = flat_outputs(rpn, features)
    assert bool(losses) == training
    pre, post = (60, 20) if training else (40, 10)
    for found, row, size in zip(proposals, rows, SIZES, strict=True):
        expected = slow_proposals(row, size, pre, post, 0.7, min_box_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("float64")
def test_losses_equal_slow_rules(features):
    """Everything is sampled, so that chance plays no part."""
    weights = {"loss_rpn_cls": 2.0, "loss_rpn_loc": 3.0}
    rpn = strong_head(
        make_rpn(batch_size_per_image=2000, positive_fraction=1.0, loss_weights=weights)
    )
    _, losses = rpn(features, SIZES, GT)
    objectness = localisation = 0.0
    num_positive = 0
    for rows, gt in zip(flat_outputs(rpn, features), GT, strict=True):
        iou = box_iou(gt, torch.stack([anchor for _, anchor, _, _ in rows]))
        for index, (_, anchor, logit, deltas) in enumerate(rows):
            best = iou[:, index].max().item() if len(gt) else 0.0
            low_quality = any(iou[m, index] == iou[m].max() for m in range(len(gt)))
            p = torch.sigmoid(logit).item()
            if best >= 0.7 or low_quality:
                num_positive += 1
                target = gt[iou[:, index].argmax()]
                objectness -= math.log(p)
                localisation += l1_to_target(anchor.tolist(), target.tolist(), deltas.tolist())
            elif best < 0.3:
                objectness -= math.log(1 - p)
    assert num_positive >= 2
    assert losses["loss_rpn_cls"].item() == pytest.approx(2 * objectness / 4000, rel=1e-4)
    assert losses["loss_rpn_loc"].item() == pytest.approx(3 * localisation / 4000, rel=1e-4)


def l1_to_target(anchor, target, deltas) -> float:
    (w, h), (tw, th) = ((b[2] - b[0], b[3] - b[1]) for b in (anchor, target))
    wanted = [
        (target[0] + tw / 2 - anchor[0] - w / 2) / w,
        (target[1] + th / 2 - anchor[1] - h / 2) / h,
        math.log(tw / w),
        math.log(th / h),
    ]
    return sum(abs(a - b) for a, b in zip(deltas, wanted, strict=True))


def test_sampling_counts_and_normalisation():
    rpn = make_rpn(batch_size_per_image=8)
    anchors = torch.cat(rpn.anchor_generator([torch.zeros(1, 1, 10, 12), torch.zeros(1, 1, 5, 6)]))
    image, indices, targets = rpn.sample_anchors(anchors, [GT[0][:0], *GT[:1] * 2])
    assert image.bincount().tolist() == [8, 8, 8]
    positive = len(targets)
    for number in (1, 2):
        assert 1 <= (image[:positive] == number).sum() <= 4
    assert len(set(zip(image.tolist(), indices.tolist(), strict=True))) == 24
    overlaps = box_iou(GT[0], anchors)
    for index, target in zip(indices, targets, strict=False):
        assert torch.equal(target, GT[0][overlaps[:, index].argmax()])
    assert (overlaps[:, indices[positive:][image[positive:] > 0]].amax(0) < 0.3).all()


def test_loss_on_image_without_objects_is_all_background(features):
    rpn = make_rpn()
    _, losses = rpn(features, SIZES, [torch.zeros(0, 4)] * 2)
    # At initialisation logits are about 0, so that each of the 32 samples costs log 2.
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2), rel=0.05)
    assert losses["loss_rpn_loc"] == 0
    sum(losses.values()).backward()
    assert rpn.rpn_head.anchor_deltas.weight.grad.abs().max() == 0


def test_proposals_carry_no_gradient_and_lie_in_the_image(features):
    proposals, _ = strong_head(make_rpn())(features, SIZES, GT)
    for boxes, (height, width) in zip(proposals, SIZES, strict=True):
        assert not boxes.requires_grad
        assert boxes.min() >= 0
        assert boxes[:, 0::2].max() <= width
        assert boxes[:, 1::2].max() <= height
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_boxes_that_are_not_finite_are_dropped(features):
    rpn = strong_head(make_rpn(post_nms_topk=(2000, 2000)))  # all that there are
    features["p0"][1] = float("nan")
    proposals, losses = rpn(features, SIZES, GT)
    assert all(boxes.isfinite().all() for boxes in proposals)
    assert all((boxes[:, 2:] > boxes[:, :2]).all() for boxes in proposals)
    assert len(proposals[1]) > 0  # those of the other level
    assert losses["loss_rpn_cls"].isnan()  # the trainer sees it


def test_numbers_in_detectron2s_own_test():
    """tests/modeling/test_rpn.py of Detectron2: seed 121, default config, and what comes out.

    The draws of a whole ResNet-50 come first there, so they do here: this is also a test of the
    initialisation.
    """
    torch.manual_seed(121)
    ResNet(50, out_features=["res5"], norm="FrozenBN", freeze_at=2, stride_in_1x1=True)
    rpn = make_rpn(
        1024,
        sizes=[[32, 64, 128, 256, 512]],
        strides=[16],
        in_features=["res4"],
        batch_size_per_image=256,
        pre_nms_topk=(12000, 6000),
        post_nms_topk=(2000, 1000),
    )
    torch.rand(2, 20, 30)
    features = {"res4": torch.rand(2, 1024, 1, 2)}
    gt = [torch.tensor([[1.0, 1.0, 3.0, 3.0]]), torch.tensor([[2.0, 2.0, 6.0, 6.0]])]
    proposals, losses = rpn(features, [(10, 10), (20, 30)], gt)
    assert losses["loss_rpn_cls"].item() == pytest.approx(0.08011703193, rel=1e-4)
    assert losses["loss_rpn_loc"].item() == pytest.approx(0.101470276, rel=1e-4)
    expected = torch.tensor([[0.0, 0.0, 10.0, 10.0], [7.2702, 0.0, 10.0, 10.0]])
    torch.testing.assert_close(proposals[0], expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("float64")
def test_single_anchors_are_what_the_whole_map_gives(features):
    """Also at the borders, and in the gradients of the map and of the head."""
    head = strong_head(make_rpn()).rpn_head
    feature = features["p1"].requires_grad_()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(2, (60,), generator=generator)
    index = torch.randint(5 * 6 * 3, (60,), generator=generator)
    index[:4] = torch.tensor([0, 5 * 3 + 2, 24 * 3, 29 * 3 + 1])  # the corners
    weight = torch.randn(60, 5, generator=generator)
    (logits,), (deltas,) = head([feature])
    expected_logits = logits.permute(0, 2, 3, 1).flatten(1)[image, index]
    expected_deltas = deltas.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)[image, index]

    def gradients(logits, deltas):
        total = (torch.cat([logits[:, None], deltas], 1) * weight).sum()
        return torch.autograd.grad(total, [feature, *head.parameters()])

    parts = [image[:20], image[20:], image[:0]], [index[:20], index[20:], index[:0]]
    logits, deltas = head.forward_sampled([feature] * 3, *parts)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(deltas, expected_deltas)
    pairs = zip(gradients(logits, deltas), gradients(expected_logits, expected_deltas), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


# -- anchors --------------------------------------------------------------------------------------

# Detectron2, tests/modeling/test_anchor_generator.py: sizes 32 and 64, height / width 1/4, 1, 4,
# on a map of 1 x 2 pixels with stride 4.
DETECTRON2 = torch.tensor(
    [
        [-32.0, -8.0, 32.0, 8.0],
        [-16.0, -16.0, 16.0, 16.0],
        [-8.0, -32.0, 8.0, 32.0],
        [-64.0, -16.0, 64.0, 16.0],
        [-32.0, -32.0, 32.0, 32.0],
        [-16.0, -64.0, 16.0, 64.0],
        [-28.0, -8.0, 36.0, 8.0],
        [-12.0, -16.0, 20.0, 16.0],
        [-4.0, -32.0, 12.0, 32.0],
        [-60.0, -16.0, 68.0, 16.0],
        [-28.0, -32.0, 36.0, 32.0],
        [-12.0, -64.0, 20.0, 64.0],
    ]
)


@pytest.mark.parametrize("nested", [False, True])
def test_values_of_detectron2(nested):
    sizes, ratios = [32, 64], [0.25, 1, 4]
    generator = AnchorGenerator([sizes] if nested else sizes, ratios, strides=[4])
    (anchors,) = generator([torch.zeros(2, 96, 1, 2)])
    torch.testing.assert_close(anchors, DETECTRON2)


@pytest.mark.parametrize("case", record_anchors.CASES)
def test_tables_recorded_from_detectron2(case):
    options = record_anchors.CASES[case]
    generator = AnchorGenerator(options["sizes"], options["aspect_ratios"], options["strides"])
    found = generator(record_anchors.feature_maps(case))
    for anchors, expected in zip(found, read("anchors")[case], strict=True):
        torch.testing.assert_close(anchors, torch.tensor(expected), rtol=1e-6, atol=1e-5)


def test_anchors_do_not_depend_on_the_maps_before():
    """Those of the largest map so far are kept, and cut."""
    sizes = [(2, 3), (5, 1), (4, 7), (1, 2), (4, 7)]
    kept = AnchorGenerator([[32, 64]], [0.5, 1.0], strides=[4])
    for height, width in sizes:
        feature = torch.zeros(1, 1, height, width)
        fresh = AnchorGenerator([[32, 64]], [0.5, 1.0], strides=[4])
        assert torch.equal(kept([feature])[0], fresh([feature])[0])
    assert kept.double()([torch.zeros(1, 1, 2, 2)])[0].dtype == torch.float64


def test_offset_moves_all_anchors_by_its_share_of_the_stride():
    (anchors,) = AnchorGenerator([32, 64], [0.25, 1, 4], [4], offset=0.5)([torch.zeros(1, 1, 1, 2)])
    torch.testing.assert_close(anchors, DETECTRON2 + 2)


def test_areas_and_ratios_are_not_rounded():
    x0, y0, x1, y1 = cell_anchors([32, 100], [0.5, 1.0, 2.0]).unbind(1)
    torch.testing.assert_close((x1 - x0) * (y1 - y0), torch.tensor([1024.0] * 3 + [10000.0] * 3))
    torch.testing.assert_close((y1 - y0) / (x1 - x0), torch.tensor([0.5, 1.0, 2.0] * 2))
    torch.testing.assert_close(x0, -x1)


def test_levels_have_their_own_sizes_and_strides():
    generator = AnchorGenerator([[32], [64]], [[0.5, 1.0, 2.0]], strides=[4, 8])
    assert generator.num_anchors == 3
    fine, coarse = generator([torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)])
    assert fine.shape == (4 * 6 * 3, 4)
    assert coarse.shape == (2 * 3 * 3, 4)
    # Row 1, column 2, the square anchor: centre (2, 1) * stride.
    assert fine[(1 * 6 + 2) * 3 + 1].tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]
    assert coarse[(1 * 3 + 2) * 3 + 1].tolist() == [16 - 32, 8 - 32, 16 + 32, 8 + 32]


def test_nothing_of_it_is_in_the_checkpoint():
    assert AnchorGenerator([32], [1.0], [4]).state_dict() == {}


def test_lists_that_do_not_fit_the_levels():
    with pytest.raises(ValueError, match="3 lists of anchor sizes for 2 feature maps"):
        AnchorGenerator([[32], [64], [128]], [1.0], strides=[4, 8])
    with pytest.raises(ValueError, match="different numbers of anchors"):
        _ = AnchorGenerator([[32], [64, 128]], [1.0], strides=[4, 8]).num_anchors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("[[8,16],[16],[32],[64],[128]]", r"different numbers of anchors: \[3, 6\]"),
        ("[[8],[16]]", "2 lists of anchor sizes for 5 feature maps"),
    ],
)
def test_a_config_s_anchors_that_do_not_fit_are_named(tmp_path, sizes, message):
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path)
    cfg = load_config(config, ["MODEL.ANCHOR_GENERATOR.SIZES", sizes])
    with pytest.raises(UserError, match=f"MODEL.ANCHOR_GENERATOR: .*{message}"):
        build_model(cfg)
