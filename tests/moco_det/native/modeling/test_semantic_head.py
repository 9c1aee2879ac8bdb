"""FCN-16s: geometry by hand and by symmetry, the loss, Detectron2's recorded numbers."""

import math

import pytest
import record_semantic_model
import torch
import torch.nn.functional as F
from float64 import ROUNDING
from record_model import fill
from recording import read
from torch import nn

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.native.modeling.meta_arch import DepthEstimator, SemanticSegmentor, build_model
from moco_det.native.modeling.semantic_head import (
    FCN16Head,
    FCNDepthHead,
    depth_distance,
    pixel_cross_entropy,
    upsample,
)


def small_cfg(*options):
    cfg = get_cfg()
    cfg.merge_from_list([*record_semantic_model.OPTIONS.split(), *options])
    return cfg


class Stride16(nn.Module):
    """A backbone of one convolution without a bias; zeros stay zeros."""

    size_divisibility = 1

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=16, padding=1, bias=False)

    def forward(self, x):
        return {"res5": self.conv(x)}


@pytest.fixture
def segmentor():
    torch.manual_seed(0)
    head = FCN16Head("res5", 4, 16, num_classes=3, channels=8, norm="")
    return SemanticSegmentor(Stride16(), head, [100.0, 110.0, 120.0], [50.0, 55.0, 60.0])


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def slow_upsample(x, stride):
    """Each pixel by itself: value i lies on pixel stride * i, the last goes on beyond."""
    rows, columns = x.shape
    out = torch.empty(stride * rows, stride * columns, dtype=x.dtype)
    for y in range(len(out)):
        for z in range(out.shape[1]):
            (i, di), (j, dj) = divmod(y, stride), divmod(z, stride)
            below, right = min(i + 1, rows - 1), min(j + 1, columns - 1)
            top = x[i, j] * (stride - dj) + x[i, right] * dj
            bottom = x[below, j] * (stride - dj) + x[below, right] * dj
            out[y, z] = (top * (stride - di) + bottom * di) / stride**2
    return out


@pytest.mark.parametrize(("size", "stride"), [((3, 4), 16), ((1, 5), 4), ((1, 1), 16)])
def test_upsampling_is_a_plain_loop(size, stride):
    x = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(upsample(x[None, None], stride)[0, 0], slow_upsample(x, stride))


def test_upsampling_is_exact_where_the_values_are():
    x = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(upsample(x, 16)[..., ::16, ::16], x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("size", "mirrored"), [((97, 65), True), ((96, 64), False)])
def test_features_lie_on_every_sixteenth_pixel(size, mirrored):
    """With mirrored kernels, mirroring an image of 16 k + 1 pixels mirrors the result: its first
    and last pixels have values of their own. At any other size it could not."""
    torch.manual_seed(0)
    model = build_model(small_cfg("MODEL.RESNETS.NORM", "BN")).double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = (layer.weight + layer.weight.flip(-1)) / 2
    image = noise(*size)
    (found,), (other,) = model([{"image": image}]), model([{"image": image.flip(-1)}])
    difference = (found["sem_seg"] - other["sem_seg"].flip(-1)).abs().max()
    assert bool(difference < ROUNDING * found["sem_seg"].abs().max()) is mirrored


def test_parameters_are_called_as_the_plugin_calls_them():
    model = build_model(small_cfg())
    names = [n for n, _ in model.named_parameters() if n.startswith("sem_seg_head.")]
    convs = [
        f"sem_seg_head.{conv}.{end}"
        for conv in ("conv1", "conv2")
        for end in ("weight", "norm.weight", "norm.bias")
    ]
    assert names == [*convs, "sem_seg_head.predictor.weight", "sem_seg_head.predictor.bias"]
    assert not [name for name in model.state_dict() if "pixel" in name]
    head = model.sem_seg_head
    assert [c.dilation for c in (head.conv1, head.conv2, head.predictor)] == [(6, 6)] * 2 + [(1, 1)]
    assert [c.weight.shape[0] for c in (head.conv1, head.conv2, head.predictor)] == [16, 16, 4]


def test_dilated_res5_sees_as_far_as_the_paper_s():
    """Stride 16 throughout, 3x3 convolutions with dilation 2 in all of res5's blocks."""
    backbone = build_model(small_cfg()).backbone
    assert backbone.strides == {"res5": 16}
    assert {block.conv2.dilation for block in backbone.res5} == {(2, 2)}
    assert {block.conv2.stride for block in backbone.res5} == {(1, 1)}


def test_loss_is_the_mean_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (2, 4, 5), generator=generator)]
    terms = []
    for n, y, x in [(n, y, x) for n in range(2) for y in range(4) for x in range(5)]:
        if labels[n, y, x] != 255:
            row = logits[n, :, y, x].tolist()
            terms.append(math.log(sum(map(math.exp, row))) - row[labels[n, y, x]])
    assert 0 < len(terms) < labels.numel()
    expected = sum(terms) / len(terms)
    assert pixel_cross_entropy(logits, labels, 255).item() == pytest.approx(expected)


def test_without_a_labelled_pixel_the_loss_is_zero_and_has_a_gradient(segmentor):
    labels = torch.full((20, 33), 255)
    (loss,) = segmentor([{"image": noise(20, 33), "sem_seg": labels}]).values()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and (p.grad == 0).all() for p in segmentor.parameters())


def test_half_precision_ends_before_the_upsampling(segmentor):
    batch = [{"image": noise(40, 33), "sem_seg": torch.ones(40, 33, dtype=torch.int64)}]
    expected = segmentor(batch)["loss_sem_seg"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentor(batch)["loss_sem_seg"]
        (found,) = segmentor.eval()(batch)
    assert loss.dtype == found["sem_seg"].dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    between = found["sem_seg"][:, 3, 5]  # no value of bfloat16, as the average of some
    assert not torch.equal(between, between.bfloat16().float())


@pytest.mark.usefixtures("float64")
def test_a_batch_of_different_sizes_is_padded_and_its_padding_ignored(segmentor):
    """In a batch, each pixel has the loss that it has in an image which is padded by hand."""
    sizes = [(40, 33), (20, 50)]
    segmentor.double()  # the mean and the deviation of pixels, too
    batch, totals, count = [], [], 0
    for seed, (h, w) in enumerate(sizes):
        labels = torch.randint(0, 3, (h, w), generator=torch.Generator().manual_seed(seed))
        batch.append({"image": noise(h, w, seed), "sem_seg": labels})
        padded = torch.empty(3, 40, 50)
        padded[:] = segmentor.pixel_mean
        padded[:, :h, :w] = batch[-1]["image"]
        logits = segmentor.eval()([{"image": padded}])[0]["sem_seg"][:, :h, :w]
        totals.append(F.cross_entropy(logits[None], labels[None], reduction="sum"))
        count += h * w
    loss = segmentor.train()(batch)["loss_sem_seg"]
    torch.testing.assert_close(loss, sum(totals) / count)


def test_scores_are_resized_to_the_original(segmentor):
    segmentor.eval()
    image = noise(40, 33)
    plain, large, padded = (
        segmentor([x])[0]["sem_seg"]
        for x in (
            {"image": image},
            {"image": image, "height": 80, "width": 99},
            {"image": image, "height": 40, "width": 33},
        )
    )
    assert plain.shape == (3, 40, 33)
    assert torch.equal(plain, padded)
    assert not plain.requires_grad
    expected = F.interpolate(plain[None], size=(80, 99), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(large, expected)


def test_numbers_recorded_from_detectron2():
    model = build_model(small_cfg())
    fill(model)
    batch = record_semantic_model.batch()
    with torch.no_grad():
        found = model.eval()(batch)
        result = record_semantic_model.summarise(model.train()(batch), found)
    expected = read("semantic_model")["segmentor"]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert result["shapes"] == expected["shapes"] == [[4, 192, 256], [4, 45, 35]]
    for ours, theirs in zip(result["scores"], expected["scores"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["NAME", "SemSegFPNHead"], "NAME is SemSegFPNHead: the native engine has FCN16Head only"),
        (["IN_FEATURES", ["res4"]], r"IN_FEATURES is \['res4'\].*features \['res5'\]"),
        (["IN_FEATURES", ["res5", "res5"]], "FCN16Head takes one of"),
        (["COMMON_STRIDE", 4], r"COMMON_STRIDE is 4, but res5 has stride 16.*equal"),
    ],
)
def test_bad_heads(options, message):
    key, value = options
    with pytest.raises(UserError, match=message):
        build_model(small_cfg(f"MODEL.SEM_SEG_HEAD.{key}", value))


def test_res5_without_dilation_is_refused():
    with pytest.raises(UserError, match=r"res5 has stride 32.*RES5_DILATION 2"):
        build_model(small_cfg("MODEL.RESNETS.RES5_DILATION", 1))


# -- depth ----------------------------------------------------------------------------------------


def test_dilation_is_that_of_the_config():
    head = build_model(small_cfg("MODEL.SEM_SEG_HEAD.DILATION", "1")).sem_seg_head
    assert [conv.dilation for conv in (head.conv1, head.conv2)] == [(1, 1)] * 2
    assert [conv.padding for conv in (head.conv1, head.conv2)] == [(1, 1)] * 2


def test_distance_of_depths_is_the_mean_over_measured_pixels():
    measured = torch.tensor([[[2.0, 0.0], [4.0, 1.0]]])
    depths = torch.tensor([[[2.5, math.inf], [1.0, 1.0]]], requires_grad=True)
    distance = depth_distance(depths, measured)
    assert distance.item() == pytest.approx((0.5 + 3 + 0) / 3)
    distance.backward()
    assert depths.grad.tolist() == [[[pytest.approx(1 / 3), 0], [pytest.approx(-1 / 3), 0]]]


def test_no_measured_pixel_is_no_loss():
    depths = torch.ones(1, 2, 2, requires_grad=True)
    distance = depth_distance(depths, torch.zeros(1, 2, 2))
    distance.backward()
    assert distance.item() == 0
    assert (depths.grad == 0).all()


@pytest.fixture
def estimator():
    torch.manual_seed(0)
    head = FCNDepthHead("res5", 4, 16, num_classes=1, channels=8, norm="", loss_weight=0.5)
    return DepthEstimator(Stride16(), head, [100.0, 110.0, 120.0], [50.0, 55.0, 60.0])


def test_images_of_a_batch_are_padded_with_unknown_depths(estimator):
    """The loss of two images is that of their pixels, whatever the padding."""
    items = [
        {"image": noise(48, 32, seed=1), "depth": torch.rand(48, 32) + 1},
        {"image": noise(32, 64, seed=2), "depth": torch.rand(32, 64) + 1},
    ]
    items[0]["depth"][:7] = 0
    loss = estimator(items)["loss_depth"].item()
    images, _ = estimator.preprocess(items)
    predicted = estimator.sem_seg_head(estimator.backbone(images))[:, 0]
    total = count = 0
    for one, item in zip(predicted, items, strict=True):
        known = item["depth"] > 0
        height, width = known.shape
        total += (one[:height, :width] - item["depth"]).abs()[known].sum().item()
        count += known.sum().item()
    assert loss == pytest.approx(0.5 * total / count, rel=1e-5)


def test_depths_are_at_the_original_size(estimator):
    item = {"image": noise(32, 48)}
    (same,), (large,) = estimator.eval()([item]), estimator([{**item, "height": 64, "width": 96}])
    assert same["depth"].shape == (32, 48)
    expected = F.interpolate(same["depth"][None, None], size=(64, 96), mode="bilinear")[0, 0]
    torch.testing.assert_close(large["depth"], expected)
