"""The looks of a batch against OpenCV's, one by one, with the same numbers."""

import itertools

import numpy as np
import pytest
import torch
from photographs import synthetic_photograph
from PIL import Image
from torch.fx.experimental.proxy_tensor import make_fx

from pretrain.data import augmentations, batched_augmentations
from pretrain.data.augmentations import CroppedView, Look, MoCoAugmentation, MoCoCrop, apply_look
from pretrain.data.batched_augmentations import apply_looks, compiled_looks, finished

CPU = torch.device("cpu")
TOLERANCE = 2.0  # grey levels of 255, mean absolute difference
PRECISE = 0.3  # what follows the same 8-bit arithmetic


@pytest.fixture(params=["synthetic", "photographs"])
def crops(request, shared_data) -> np.ndarray:
    """N x 96 x 96 x 3."""
    if request.param == "synthetic":
        image = synthetic_photograph()
        return np.stack([image[y : y + 96, x : x + 96] for y in (0, 99) for x in (0, 80, 250)])
    paths = sorted(shared_data("voc2012_40").glob("VOC2012/JPEGImages/*.jpg"))[:6]
    return np.stack([np.array(Image.open(path).convert("RGB"))[100:196, 90:186] for path in paths])


def batch(pixels: np.ndarray, looks: list[Look]) -> CroppedView:
    return CroppedView(torch.from_numpy(pixels), torch.tensor(np.array(looks, dtype=np.float32)))


def differences(pixels: np.ndarray, looks: list[Look]) -> np.ndarray:
    """Of each crop: the mean of |batched - OpenCV|."""
    ours = finished(batch(pixels, looks), CPU).numpy()
    assert ours.dtype == np.uint8
    theirs = [apply_look(crop, look) for crop, look in zip(pixels, looks, strict=True)]
    return np.abs(ours.astype(float) - np.stack(theirs)).mean(axis=(1, 2, 3))


# Not 1.3, which makes of 10 a whole number that float32 misses: such a draw is never met.
FACTORS = (0.21, 0.61, 0.87, 1.0, 1.37, 1.83)

# Of an operation alone the jitter's other three leave the crop as it is, but for the hue's way to 8
# bits and back.
ALONE = {
    "brightness": [Look(jitter=True, brightness=f) for f in FACTORS],
    "contrast": [Look(jitter=True, contrast=f) for f in FACTORS],
    "saturation": [Look(jitter=True, saturation=f) for f in FACTORS],
    "hue": [Look(jitter=True, hue=s) for s in (-0.5, -0.1, -0.003, 0.0, 0.07, 0.4)],
    "grayscale": [Look(gray_first=n % 2, gray_last=n % 3 == 0) for n in range(6)],
    "blur": [Look(sigma=s) for s in (0.1, 0.3, 0.7, 1.0, 1.5, 2.0)],
}


@pytest.mark.parametrize("operation", ALONE)
def test_each_operation_follows_opencv(crops, operation):
    assert differences(crops, ALONE[operation]).max() < PRECISE < TOLERANCE


def test_a_flip_and_a_look_without_anything_are_exact(crops):
    looks = [Look(), Look(flip=True)] * 3
    assert differences(crops, looks).max() == 0
    assert np.array_equal(finished(batch(crops, looks), CPU)[0], crops[0])


def test_the_jitters_operations_come_in_the_order_drawn(crops):
    """All 24: of OpenCV's results in each order, the one in the same order is the nearest."""
    strong = {"brightness": 1.73, "contrast": 0.41, "saturation": 1.83, "hue": 0.3}
    looks = [Look(False, True, *strong.values(), *o) for o in itertools.permutations(range(4))]
    views = np.stack([crops[0]] * len(looks))
    ours = finished(batch(views, looks), CPU).numpy().astype(float)
    theirs = np.stack([apply_look(crops[0], look) for look in looks])
    apart = np.abs(ours[:, None] - theirs[None]).mean(axis=(2, 3, 4))
    assert np.diag(apart).max() < 1.0
    assert apart.argmin(axis=1).tolist() == list(range(24))


@pytest.mark.parametrize(("aug_plus", "strength"), [(False, 0.5), (True, 0.5), (True, 1.0)])
def test_views_are_those_of_the_cpu(crops, aug_plus, strength):
    """Both recipes whole, from the same generator: 200 views."""
    whole, cropped = (kind(64, aug_plus, strength) for kind in (MoCoAugmentation, MoCoCrop))
    expected, found = [], []
    for number in range(200):
        image = crops[number % len(crops)]
        expected.append(whole(image, np.random.default_rng(number)))
        found.append(cropped(image, np.random.default_rng(number)))
    ours = finished(
        CroppedView(*map(torch.from_numpy, map(np.stack, zip(*found, strict=True)))), CPU
    )
    difference = np.abs(ours.numpy().astype(float) - np.stack(expected)).mean(axis=(1, 2, 3))
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.99) < TOLERANCE


def test_a_crop_does_not_depend_on_its_companions(crops, monkeypatch):
    looks = [MoCoCrop(96, True).draw(96, 96, np.random.default_rng(n)).look for n in range(6)]
    together = finished(batch(crops, looks), CPU)
    monkeypatch.setattr(batched_augmentations, "CHUNK", 2)
    assert torch.equal(finished(batch(crops, looks), CPU), together)


def test_a_view_of_the_cpu_is_left_as_it_is():
    view = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(finished(view, CPU), view)


def test_mixed_precision_does_not_reach_colours(crops):
    looks = [look for looks in ALONE.values() for look in looks[:1]]
    expected = finished(batch(crops, looks), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(finished(batch(crops, looks), CPU), expected)


def test_shapes_do_not_depend_on_what_is_drawn(crops):
    """The same operations whatever the numbers: the fake tensors of a trace have none."""
    traced = make_fx(batched_augmentations.apply_looks, tracing_mode="fake")
    looks = np.array(ALONE["blur"], dtype=np.float32)
    graph = traced(torch.from_numpy(crops), torch.from_numpy(looks))
    drawn = [MoCoCrop(96, True).draw(96, 96, np.random.default_rng(n)).look for n in range(6)]
    pixels, looks = batch(crops, drawn)
    assert torch.equal(graph(pixels, looks), finished(CroppedView(pixels, looks), CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("build", [lambda: apply_looks, compiled_looks], ids=["plain", "compiled"])
def test_a_gpu_gives_what_the_cpu_gives(crops, build):
    gpu = torch.device("cuda")
    looks = [MoCoCrop(96, True).draw(96, 96, np.random.default_rng(n)).look for n in range(6)]
    on_gpu = finished(batch(crops, looks), gpu, build()).cpu().float()
    assert (on_gpu - finished(batch(crops, looks), CPU).float()).abs().mean() < PRECISE


@pytest.mark.slow
def test_compiled_looks_are_those_of_the_plain_code(crops):
    looks = [MoCoCrop(96, True).draw(96, 96, np.random.default_rng(n)).look for n in range(6)]
    plain = finished(batch(crops, looks), CPU).float()
    compiled = finished(batch(crops, looks), CPU, compiled_looks()).float()
    assert (compiled - plain).abs().mean() < 0.01


def test_without_a_compiler_a_line_says_so_and_the_plain_code_runs(crops, monkeypatch, capsys):
    def compile(function, dynamic):
        def fail(*_):
            raise RuntimeError("no compiler\nhere")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    looks = [Look(flip=True)] * 6
    apply = compiled_looks()
    for _ in range(2):
        assert torch.equal(
            finished(batch(crops, looks), CPU, apply), finished(batch(crops, looks), CPU)
        )
    assert capsys.readouterr().out == "the views' looks are not compiled: no compiler here\n"


def test_draws_are_one_code_for_both():
    assert MoCoCrop.draw is MoCoAugmentation.draw is augmentations.MoCoAugmentation.draw
