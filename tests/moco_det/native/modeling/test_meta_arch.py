"""The whole detector: Detectron2's recorded numbers, input and output conventions, bad configs."""

from functools import partial

import numpy as np
import pytest
import record_model as recorder
import torch
from float64 import ROUNDING, assert_equal_but_for_rounding, in_float64
from fork_server import run_in_two_processes
from recording import read

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.native.modeling.backbones import build_backbone
from moco_det.native.modeling.layers import half_precision, kernels_of
from moco_det.native.modeling.meta_arch import build_model, detector_postprocess
from moco_det.parity.comparison import fill_outlines

GROUND_TRUTH = ("GT_BOXES", "GT_CLASSES", "GT_POLYGONS", "GT_KEYPOINTS", "ORIGINAL")


def small_cfg(*options):
    """R-18 FPN with a small head, on the CPU."""
    cfg = get_cfg()
    cfg.merge_from_list(recorder.options("R18-FPN"))
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *options])
    return cfg


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model(small_cfg())
    recorder.fill(model)
    return model


def example(height=64, width=64, boxes=((8.0, 8.0, 40.0, 48.0),), classes=(1,), seed=0):
    """Noise; in each box a triangle as mask, and two keypoints."""
    generator = torch.Generator().manual_seed(seed)
    gt_boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    keypoints = torch.full((len(boxes), 2, 3), 2.0)
    keypoints[..., :2] = gt_boxes[:, None, :2] + 1.5
    return {
        "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
        "gt_boxes": gt_boxes,
        "gt_classes": torch.tensor(classes, dtype=torch.int64),
        "gt_masks": [[np.array([x0, y0, x1, y0, x0, y1])] for x0, y0, x1, y1 in boxes],
        "gt_keypoints": keypoints,
    }


@pytest.mark.parametrize("case", recorder.CASES)
def test_numbers_recorded_from_detectron2(case):
    cfg = get_cfg()
    cfg.merge_from_list(recorder.options(case))
    model = build_model(cfg)
    recorder.fill(model)
    truth = zip(*(getattr(recorder, name) for name in GROUND_TRUTH), strict=True)
    keys = ("image", "gt_boxes", "gt_classes", "gt_masks", "gt_keypoints", "height", "width")
    batch = [
        dict(zip(keys, (image, *values, *size), strict=True))
        for image, (*values, size) in zip(recorder.images(), truth, strict=True)
    ]
    with torch.no_grad():
        found = model.eval()(batch)
        losses = model.train()(batch)
    result = recorder.summarise(losses, found)

    expected = read("model")[case]
    assert list(result["losses"]) == list(expected["losses"])
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    for ours, theirs in zip(result["detections"], expected["detections"], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["count"] == theirs["count"] > 10
        assert ours["classes"] == theirs["classes"]
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-3)
        for key in ("boxes", "keypoints", "masks"):
            tolerance = {"rtol": 1e-3, "atol": 2.0 if key == "masks" else 1e-2}  # pixels
            a, b = (torch.tensor(x.get(key, []), dtype=torch.float32) for x in (ours, theirs))
            torch.testing.assert_close(a, b, **tolerance)


def test_preprocess_normalises_and_pads(model):
    """Per channel (x - mean) / std, then zeros to the largest size and a multiple of 32."""
    images = [torch.full((3, 40, 70), 100, dtype=torch.uint8), torch.zeros(3, 50, 33)]
    padded, sizes = model.preprocess([{"image": x} for x in images])
    assert padded.shape == (2, 3, 64, 96)
    assert sizes == [(40, 70), (50, 33)]
    mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.tensor([57.375, 57.12, 58.395])
    torch.testing.assert_close(padded[0, :, 7, 9], (100 - mean) / std)
    torch.testing.assert_close(padded[1, :, 49, 32], -mean / std)
    assert padded[0, :, 40:].abs().max() == padded[0, :, :, 70:].abs().max() == 0
    assert padded[1, :, 50:].abs().max() == padded[1, :, :, 33:].abs().max() == 0


def test_checkpoint_holds_no_pixel_statistics(model):
    assert not [
        name for name in model.state_dict() if "pixel" in name or "anchor_generator" in name
    ]


def test_image_type_does_not_matter(model):
    model.eval()
    x = example()
    as_bytes, as_floats = model([x]), model([{"image": x["image"].float()}])
    assert torch.equal(as_bytes[0]["boxes"], as_floats[0]["boxes"])


def test_rescale_by_hand():
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 50.0, 100.0], [7.0] * 4]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "classes": torch.tensor([2, 1, 0]),
    }
    (result,) = detector_postprocess([found], sizes=[(100, 50)], originals=[(50, 100)])
    assert result["boxes"].tolist() == [[20.0, 10.0, 60.0, 20.0], [0.0, 0.0, 100.0, 50.0]]
    assert result["classes"].tolist() == [2, 1]  # the empty box is gone
    torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.8]))


def test_rescale_masks_and_keypoints_by_hand():
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 12.0, 28.0], [7.0] * 4, [0.0, 0.0, 50.0, 100.0]]),
        "mask_probabilities": torch.stack([torch.full((4, 4), p) for p in (0.9, 0.8, 0.4)]),
        "keypoints": torch.tensor([[[12.0, 30.0, 0.7]], [[1.0, 2.0, 0.3]], [[5.0, 50.0, 0.2]]]),
    }
    (result,) = detector_postprocess([found], sizes=[(100, 50)], originals=[(50, 100)])
    torch.testing.assert_close(
        result["keypoints"], torch.tensor([[[24.0, 15.0, 0.7]], [[10.0, 25.0, 0.2]]])
    )
    expected = torch.zeros(2, 50, 100, dtype=torch.bool)
    expected[0, 10:14, 20:24] = True
    assert torch.equal(result["masks"], expected)
    assert set(result) == {"boxes", "masks", "keypoints"}
    assert found["keypoints"][0, 0, 0] == 12  # the input is left alone


def test_detections_come_in_pixels_of_the_original(model):
    model.eval()
    x = example(64, 96)
    (plain,) = model([x])
    (doubled,) = model([x | {"height": 128, "width": 96}])
    assert len(plain["boxes"]) > 0
    torch.testing.assert_close(doubled["boxes"], plain["boxes"] * torch.tensor([1.0, 2.0] * 2))
    assert plain["boxes"][:, 2].max() <= 96
    assert plain["boxes"][:, 3].max() <= 64
    assert (plain["scores"].diff() <= 0).all()
    assert plain["boxes"].dtype == plain["scores"].dtype == torch.float32
    assert plain["classes"].dtype == torch.int64
    assert not plain["boxes"].requires_grad


def test_image_without_objects_trains(model):
    model.train().zero_grad()
    losses = model([example(), example(boxes=(), classes=(), seed=1)])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    losses = model([example(boxes=(), classes=())])
    assert losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0
    sum(losses.values()).backward()  # every parameter still gets a gradient: DDP waits for it
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


ALL_HEADS = """
MODEL.MASK_ON True MODEL.ROI_MASK_HEAD.NUM_CONV 1 MODEL.ROI_MASK_HEAD.CONV_DIM 8
MODEL.ROI_MASK_HEAD.NORM BN MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,)
MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 2
"""


def test_masks_and_keypoints_of_an_image_without_objects_train():
    model = build_model(small_cfg(*ALL_HEADS.split()))
    recorder.fill(model)
    empty = example(boxes=(), classes=(), seed=1)
    for batch in ([example(), empty], [empty]):
        model.zero_grad()
        losses = model(batch)
        names = ["loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint"]
        assert list(losses)[:4] == names
        assert all((losses[name] > 0) == (len(batch) == 2) for name in names[1:])
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients)


def test_masks_and_keypoints_come_in_pixels_of_the_original():
    model = build_model(small_cfg(*ALL_HEADS.split())).eval()
    recorder.fill(model)
    x = example(64, 96)
    (plain,) = model([x])
    (doubled,) = model([x | {"height": 128, "width": 96}])
    assert plain["masks"].shape == (len(plain["boxes"]), 64, 96)
    assert doubled["masks"].shape == (len(plain["boxes"]), 128, 96)
    assert 0.01 < plain["masks"].float().mean() < 0.9
    scale = torch.tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(doubled["keypoints"], plain["keypoints"] * scale)
    # Pixels of the larger masks in fours are those of the smaller but near outlines.
    agree = doubled["masks"][:, ::2] == plain["masks"]
    assert agree.float().mean() > 0.9


@pytest.mark.usefixtures("float64")
def test_channels_last_gives_the_same_losses():
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = build_model(small_cfg()).double()
        recorder.fill(model)
        model.to(memory_format=layout)
        torch.manual_seed(0)
        losses.append({k: v.item() for k, v in model([example(64, 96)]).items()})
    assert losses[1] == pytest.approx(losses[0], rel=ROUNDING)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def losses_detections_gradients(device, kind, *opts):
    """Of three images, one without objects, with all heads; on the CPU."""
    with kernels_of(kind):
        model = build_model(small_cfg(*ALL_HEADS.split(), "MODEL.DEVICE", device, *opts)).double()
        model.proposal_generator.anchor_generator.float()
        recorder.fill(model)
        nothing = example(96, 64, boxes=(), classes=(), seed=3)
        batch = [example(64, 96), nothing, example(80, 80, seed=1)]
        if "bitmask" in opts:
            for x in batch:
                x["gt_masks"] = fill_outlines(x["gt_masks"], x["image"].shape[1:])
        losses = model(batch)
        sum(losses.values()).backward()
        gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        found = [{k: v.cpu() for k, v in x.items()} for x in model.eval()(batch)]
    return {k: v.item() for k, v in losses.items()}, gradients, found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("device", "mask_format"),
    [
        ("cpu", "polygon"),
        pytest.param("cuda", "polygon", marks=pytest.mark.gpu),
        pytest.param("cuda", "bitmask", marks=pytest.mark.gpu),
    ],
)
def test_both_kinds_of_kernels_give_the_same(device, mask_format):
    """Losses, gradients and detections of a batch, by the code of GPUs and by that of CPUs.

    All anchors and proposals are sampled: a GPU would draw others.
    """
    opts = ("INPUT.MASK_FORMAT", mask_format)
    opts += ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0")
    opts += ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000")
    opts += ("MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0")
    losses, gradients, found = losses_detections_gradients("cpu", "cpu", *opts)
    on_device = losses_detections_gradients(device, "cuda", *opts)
    assert on_device[0] == pytest.approx(losses, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(on_device[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert [len(x["boxes"]) for x in found] == [len(x["boxes"]) for x in on_device[2]]
    assert sum(len(x["boxes"]) for x in found) > 10
    for ours, theirs in zip(on_device[2], found, strict=True):
        assert torch.equal(ours["classes"], theirs["classes"])
        assert (ours["masks"] != theirs["masks"]).float().mean() < 1e-4
        for key in ("boxes", "scores", "keypoints"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-3)


def test_channels_last_lasts_from_the_images_on():
    """No convolution on a whole image gets a map that has to be rearranged first."""
    with kernels_of("cuda"):
        model = build_model(small_cfg())
        inputs = {}
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Conv2d) and not name.startswith("roi_heads"):
                hook = partial(inputs.__setitem__, name)
                layer.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0]))
        model([example(64, 96), example(80, 80, seed=1)])
    assert len(inputs) > 20
    for name, x in inputs.items():
        assert x.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_trains_and_is_close(device):
    device = torch.device(device)
    with kernels_of("cuda"):
        model = build_model(small_cfg(*ALL_HEADS.split(), "MODEL.DEVICE", str(device)))
        recorder.fill(model)
        losses = []
        for enabled in (False, True):
            torch.manual_seed(0)
            with torch.autocast(device.type, half_precision(device), enabled=enabled):
                losses.append(model([example(96, 96), example(64, 96, seed=1)]))
        sum(losses[1].values()).backward()
    for name, value in losses[1].items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(losses[0][name].item(), rel=0.15)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bfloat16_autocast_is_close():
    torch.manual_seed(0)
    model = build_model(small_cfg(*ALL_HEADS.split()))
    recorder.fill(model)
    torch.manual_seed(0)
    expected = model([example(96, 96)])
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([example(96, 96)])
        (found,) = model.eval()([example(96, 96)])
    assert found["masks"].any()
    assert found["keypoints"].dtype == torch.float32
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.1)
    sum(losses.values()).backward()


def two_images():
    """Of one size and with one object each, so that both count the same in every mean."""
    return [example(96, 96, seed=1), example(96, 96, ((30.0, 20.0, 90.0, 70.0),), (3,), seed=2)]


def losses_and_gradients(model, batch):
    losses = model(batch)
    sum(losses.values()).backward()
    return {k: v.detach() for k, v in losses.items()}


def _ddp_process(process: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )
    with in_float64():
        model = synced_model()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        losses = losses_and_gradients(parallel, [two_images()[process]])
    state = {k: v for k, v in model.state_dict().items() if "running" in k}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    torch.save((losses, gradients, state), f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


def synced_model():
    norms = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD")]
    model = build_model(small_cfg(*(x for norm in norms for x in (norm, "SyncBN")))).double()
    recorder.fill(model)
    return model


def test_two_processes_with_sync_bn_equal_one(tmp_path):
    """2 processes x 1 image: mean losses, gradients and statistics of 1 process x 2 images."""
    run_in_two_processes(_ddp_process, str(tmp_path))
    results = [torch.load(tmp_path / f"{p}.pt") for p in (0, 1)]
    with in_float64():
        model = synced_model()
        expected = losses_and_gradients(model, two_images())
    for name, value in expected.items():
        mean = sum(losses[name] for losses, _, _ in results) / 2
        torch.testing.assert_close(mean, value, rtol=ROUNDING, atol=0)
    for _, gradients, state in results:
        for name, gradient in gradients.items():
            assert_equal_but_for_rounding(gradient, model.get_parameter(name).grad, name)
        for name, value in state.items():
            assert_equal_but_for_rounding(value, model.state_dict()[name], name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.BACKBONE.NAME", "build_vit"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"),
    ],
)
def test_what_is_not_there_is_refused_by_name(key, value):
    message = f"{key} {value!r}: the native engine supports only"
    with pytest.raises(UserError, match=message):
        build_model(small_cfg(key, value))
    with pytest.raises(UserError, match=message):
        build_backbone(small_cfg(key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.RESNETS.OUT_FEATURES", ["res9"], "MODEL.RESNETS.OUT_FEATURES.*res9"),
        ("MODEL.FPN.IN_FEATURES", ["res9"], "MODEL.FPN.IN_FEATURES.*the backbone gives res2"),
        ("MODEL.FPN.IN_FEATURES", ["res2", "res4"], "MODEL.FPN.IN_FEATURES.*do not double"),
        ("MODEL.RPN.IN_FEATURES", ["p2", "p9"], "MODEL.RPN.IN_FEATURES.*the backbone gives p2"),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES.*gives p2"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]], "MODEL.ANCHOR_GENERATOR: 2 lists of"),
    ],
)
def test_features_that_do_not_fit_each_other_are_named(key, value, message):
    with pytest.raises(UserError, match=message):
        build_model(small_cfg(key, value))
