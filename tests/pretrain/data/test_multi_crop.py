"""The views of an image: drawn together, and made of one decoding."""

import io

import numpy as np
import pytest
import torch
from photographs import synthetic_photograph
from PIL import Image
from torchvision import transforms

from moco_det.common.images import EncodedImage, check_image
from pretrain.data.augmentations import (
    CroppedView,
    Look,
    MoCoAugmentation,
    MoCoCrop,
    horizontal_flip,
    resized_crop,
)
from pretrain.data.batched_augmentations import finished
from pretrain.data.crops import iou, share_within
from pretrain.data.images import LoadedViews, collate_views, make_views
from pretrain.data.multi_crop import KEY, MultiCrop, free_shares


def two_and(small: int, share: float = 0.0, kind=MoCoAugmentation, **options) -> MultiCrop:
    """Two large crops of 40 pixels and `small` ones of 24."""
    large = kind(40, True)
    return MultiCrop([large, large, *[kind(24, True, 0.5, 0.05, 0.14)] * small], share, **options)


def test_without_conditions_the_large_views_are_drawn_as_ever():
    """Recorded before there were any: windows and looks of MoCo v2 and then of v1, and the draw
    after them."""
    rng, drawn = np.random.default_rng(7), []
    for aug_plus in (True, False):
        views, free = MultiCrop([MoCoAugmentation(224, aug_plus)] * 2).draw(480, 640, rng)
        assert free == [False, False]
        drawn += views
    assert [view.window for view in drawn] == [
        (38, 93, 414, 520), (26, 103, 424, 437), (17, 51, 434, 433), (29, 123, 320, 398),
    ]  # fmt: skip
    assert drawn[0].look == Look(
        False, True, 0.8401330279289803, 1.2988427563170095, 0.6042122436524597,
        0.06424568367655326, 0, 3, 1, 2, False, 0.5842522165428368, True,
    )  # fmt: skip
    assert [view.look.hue for view in drawn[1:]] == [
        -0.06795759322843109, -0.10437095151823467, 0.032915057101191025,
    ]  # fmt: skip
    assert all(view.policy is None for view in drawn)
    assert rng.random() == 0.5981840672072131


def test_small_crops_change_nothing_of_the_large_ones():
    alone, _ = two_and(0).draw(480, 640, np.random.default_rng(1))
    for share in (0.0, 0.1):
        views, _ = two_and(4, share).draw(480, 640, np.random.default_rng(1))
        assert views[:2] == alone
        assert len(views) == 6
        assert len(set(views)) == 6


def test_small_crops_lie_within_the_keys_crop_and_not_the_querys():
    crops, beside_query = two_and(4, share=0.9), 0
    for seed in range(100):
        (query, key, *small), free = crops.draw(480, 640, np.random.default_rng(seed))
        assert free[:2] == [False, False]
        for view, failed in zip(small, free[2:], strict=True):
            assert failed or share_within(view.window, key.window) >= 0.9
            beside_query += share_within(view.window, query.window) < 0.9
    assert beside_query > 40


@pytest.mark.parametrize("ious", [(0.0, 0.2), (0.7, 1.0)])
def test_the_iou_of_the_large_crops_is_limited(ious):
    """The small ones follow the key's new crop."""
    crops, changed = two_and(1, share=1.0, ious=ious), 0
    for seed in range(100):
        views, free = crops.draw(480, 640, np.random.default_rng(seed))
        before, _ = two_and(1).draw(480, 640, np.random.default_rng(seed))
        assert not free[KEY]
        assert ious[0] <= iou(views[0].window, views[1].window) <= ious[1]
        assert free[2] or share_within(views[2].window, views[1].window) == 1
        assert [view.look for view in views[:2]] == [view.look for view in before[:2]]
        changed += views[:2] != before[:2]
    assert changed > 50


def test_a_pair_that_cannot_be_met_is_free_and_as_first_drawn():
    crops = two_and(0, ious=(0.0, 0.5))
    views, free = crops.draw(10, 1000, np.random.default_rng(0))
    assert free == [False, True]
    assert views == two_and(0).draw(10, 1000, np.random.default_rng(0))[0]


# -- AutoAugment ----------------------------------------------------------------------------------


def photograph(width: int, height: int) -> np.ndarray:
    whole = Image.fromarray(synthetic_photograph())
    return np.array(whole.resize((width, height), Image.BICUBIC))


def test_a_view_with_autoaugment_is_torchvisions_under_the_same_seed():
    image, policy, mirrored = photograph(80, 60), transforms.AutoAugment(), set()
    strong = MoCoAugmentation(32, True, strong=1.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for seed in range(30):
        drawn = strong.draw(60, 80, np.random.default_rng(seed))
        assert drawn.look == Look()
        mirrored.add(drawn.mirrored)
        view = strong.view(image, drawn)
        crop = resized_crop(image, *drawn.window, 32)
        crop = horizontal_flip(crop) if drawn.mirrored else crop
        assert torch.equal(torch.get_rng_state(), before)  # the run's own draws stay what they are
        with torch.random.fork_rng():
            torch.manual_seed(drawn.policy)
            expected = policy(Image.fromarray(crop))
        assert np.array_equal(view, np.asarray(expected))
    assert mirrored == {False, True}


@pytest.mark.parametrize(("strong", "low", "high"), [(1.0, 1, 1), (0.5, 0.4, 0.6)])
def test_positives_have_autoaugment_and_the_key_never(strong, low, high):
    query, key = MoCoAugmentation(40, True, strong=strong), MoCoAugmentation(40, True)
    small = MoCoAugmentation(24, True, 0.5, 0.05, 0.14, strong)
    crops = MultiCrop([query, key, small, small])
    drawn = [crops.draw(60, 80, np.random.default_rng(seed))[0] for seed in range(200)]
    share = np.array([[view.policy is not None for view in views] for views in drawn]).mean(0)
    assert share[KEY] == 0
    for place in (0, 2, 3):
        assert low <= share[place] <= high
    assert len({view.policy for views in drawn for view in views}) > 500 * strong


def test_the_device_gets_views_with_autoaugment_done():
    """Crops whose looks the device gives, and those done by the workers, are the same views."""
    image = photograph(80, 60)
    whole, cropped = (kind(32, True, strong=0.5) for kind in (MoCoAugmentation, MoCoCrop))
    drawn = [whole.draw(60, 80, np.random.default_rng(seed)) for seed in range(12)]
    expected = np.stack([whole.view(image, view) for view in drawn])
    parts = [cropped.view(image, view) for view in drawn]
    batch = CroppedView(*(torch.from_numpy(np.stack(p)) for p in zip(*parts, strict=True)))
    ours = finished(batch, torch.device("cpu")).numpy()
    strong = np.array([view.policy is not None for view in drawn])
    assert 0 < strong.sum() < 12
    assert np.array_equal(ours[strong], expected[strong])
    assert np.abs(ours.astype(float) - expected).mean() < 0.5


# -- pixels ---------------------------------------------------------------------------------------


def encoded(width: int, height: int) -> EncodedImage:
    buffer = io.BytesIO()
    Image.fromarray(photograph(width, height)).save(buffer, "JPEG", quality=95)
    return check_image(buffer.getvalue(), "photograph")


@pytest.mark.parametrize("kind", [MoCoAugmentation, MoCoCrop])
def test_a_batch_has_the_pixels_of_two_large_and_n_small_crops(kind):
    """The paper's: 88 % of those of 2 x 224 (2 x 160 + 4 x 96)."""
    crops, image = two_and(4, 0.1, kind), encoded(80, 60)
    samples = [
        LoadedViews(*make_views(image, crops, np.random.default_rng(seed)), []) for seed in range(3)
    ]
    batch = collate_views(samples)
    views = [getattr(view, "pixels", view) for view in batch.views]
    assert [view.shape[1] for view in views] == [40, 40, 24, 24, 24, 24]
    assert sum(view.numel() for view in views) == 3 * 3 * (2 * 40**2 + 4 * 24**2)
    assert batch.free_crops.shape == (3, 6)
    assert batch.free_crops.dtype == torch.bool
    assert pytest.approx(0.8775, abs=1e-4) == (2 * 160**2 + 4 * 96**2) / (2 * 224**2)


def test_an_image_is_decoded_as_large_as_its_small_crops_need_it(monkeypatch):
    """A fifth of its side in 24 pixels wants more of the image than all of it in 40."""
    reductions, decode = [], EncodedImage.decode

    def noting(self, reduction=1):
        reductions.append(reduction)
        return decode(self, reduction)

    monkeypatch.setattr(EncodedImage, "decode", noting)
    image = encoded(800, 600)
    for small in (0, 4):
        for seed in range(10):
            crops = two_and(small)
            views, _ = make_views(image, crops, np.random.default_rng(seed))
            drawn, _ = crops.draw(600, 800, np.random.default_rng(seed))
            for augment, view in zip(crops.augmentations, drawn, strict=True):
                assert min(view.window[2:]) / reductions[-1] >= augment.size
            assert [len(view) for view in views] == [40, 40] + [24] * small
    assert min(reductions[:10]) >= 4
    assert max(reductions[10:]) <= 4 and 1 < min(reductions[10:]) < max(reductions[:10])


def test_free_crops_reach_the_batch_and_the_log():
    free = [[False, True, False, False, True], [False, False, False, False, False]]
    samples = [LoadedViews([np.zeros((2, 2, 3), np.uint8)] * 5, some, []) for some in free]
    batch = collate_views(samples)
    assert batch.free_crops.tolist() == free
    assert free_shares(batch.free_crops, ()).tolist() == []
    assert free_shares(batch.free_crops, ("free_crops",)).tolist() == pytest.approx([1 / 6])
    both = free_shares(batch.free_crops, ("free_pairs", "free_crops"))
    assert both.tolist() == pytest.approx([1 / 2, 1 / 6])


def test_what_has_a_condition_is_known_by_name():
    assert two_and(4).conditions == ()
    assert two_and(4, 0.1).conditions == ("free_crops",)
    assert two_and(0, ious=(0.0, 0.9)).conditions == ("free_pairs",)
    assert two_and(4, 0.1, ious=(0.1, 1.0)).conditions == ("free_pairs", "free_crops")
