import io

import cv2
import numpy as np
import pytest
import torch
from photographs import synthetic_photograph
from PIL import Image

from moco_det.common.errors import LONGEST, UserError
from moco_det.common.images import EncodedImage, check_image
from pretrain.data.augmentations import (
    OVERSAMPLING,
    Look,
    MoCoAugmentation,
    MoCoCrop,
    apply_look,
)
from pretrain.data.images import (
    DistributedBatchSampler,
    FolderSource,
    ImageViews,
    Loading,
    UnreadableImages,
    collate_views,
    make_views,
    training_folder,
)
from pretrain.data.listing import find_images
from pretrain.data.multi_crop import MultiCrop

ORDER = ("first", "second", "third", "fourth")  # of a look, which are used to index


def photograph(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((40, 30), Image.BICUBIC)  # too small for any crop to be decoded smaller


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        target = tmp_path / "images" / f"class{i % 2}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        photograph(i).save(target)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def views_of(folder, num_views: int = 2) -> ImageViews:
    crops = MultiCrop([MoCoAugmentation(16, True)] * num_views)
    return ImageViews(folder, find_images(folder), crops, seed=3)


def test_train_folder_is_preferred(folder):
    assert training_folder(folder) == folder
    (folder / "train").mkdir()
    assert training_folder(folder) == folder / "train"


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder):
    one, again = views_of(folder), views_of(folder)
    for key in [(0, 1), (0, 2), (1, 1)]:
        (query, key_view), *_ = one[key]
        (same_query, same_key), *_ = again[key]
        assert np.array_equal(query, same_query)
        assert np.array_equal(key_view, same_key)
    (query, key_view), *_ = one[(0, 1)]
    assert not np.array_equal(query, one[(1, 1)][0][0])
    assert not np.array_equal(query, key_view)


def test_an_unreadable_image_is_replaced_by_the_next_and_reported(folder):
    (folder / "class0" / "2.jpg").write_bytes(b"not an image")
    (query, key), _, unreadable = views_of(folder)[(0, 1)]
    assert query.shape == key.shape == (16, 16, 3)
    assert len(unreadable) == 1
    assert "class0/2.jpg" in unreadable[0]


def test_nothing_readable_gives_no_batch(folder):
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    views, _, unreadable = collate_views([views_of(folder)[(0, 0)]])
    assert views == []
    assert len(set(unreadable)) == 6


def test_too_many_unreadable_images_are_told_in_one_line_however_long_the_path():
    path, reason = f"/data/{'folder/' * 40}5.png", "400,000,000 pixels: see --max-pixels"
    with pytest.raises(UserError) as caught:
        UnreadableImages(total=1_281_167, tolerated=0.01).add([f"{path}: {reason}"], fatal=True)
    message = str(caught.value)
    assert len(f"error: {message}") <= LONGEST
    assert message.startswith("1 of 1281167 images are unreadable")
    assert message.endswith(f"5.png: {reason}")


def test_batches_are_stacked_as_uint8(folder):
    dataset = views_of(folder)
    (queries, keys), _, unreadable = collate_views([dataset[(0, i)] for i in range(4)])
    assert queries.shape == keys.shape == (4, 16, 16, 3)
    assert queries.dtype == keys.dtype
    assert np.array_equal(queries[2].numpy(), dataset[(0, 2)][0][0])
    assert unreadable == []


def test_without_keys_the_query_stays_and_no_key_is_made(folder):
    dataset = views_of(folder, num_views=1)
    (queries,), *_ = collate_views([dataset[(0, i)] for i in range(3)])
    assert np.array_equal(queries[2].numpy(), views_of(folder)[(0, 2)][0][0])


def test_views_of_different_sizes_make_a_tensor_each(folder):
    """As multi-crop has them; the first views' draws do not depend on the later ones."""
    augmentations = [MoCoAugmentation(size, True) for size in (16, 16, 8)]
    dataset = ImageViews(folder, find_images(folder), MultiCrop(augmentations), seed=3)
    views, *_ = collate_views([dataset[(0, i)] for i in range(4)])
    assert [tuple(view.shape) for view in views] == [(4, 16, 16, 3), (4, 16, 16, 3), (4, 8, 8, 3)]
    for view, expected in zip(views, views_of(folder)[(0, 1)][0], strict=False):
        assert np.array_equal(view[1].numpy(), expected)


def test_the_global_batch_is_what_all_processes_load():
    parts = [DistributedBatchSampler(100, 8, rank, 2, seed=5) for rank in (0, 1)]
    for part in parts:
        part.start(3, 7)
    loaded = [index for part in parts for _, index in next(iter(part))]
    assert parts[0].global_batch(7).tolist() == parts[1].global_batch(7).tolist() == loaded


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size):
    whole = list(DistributedBatchSampler(100, 8, rank=0, world_size=1, seed=5))
    parts = [
        list(DistributedBatchSampler(100, 8, rank, world_size, seed=5))
        for rank in range(world_size)
    ]
    joined = [sum(slices, []) for slices in zip(*parts, strict=True)]
    assert joined == whole
    assert len(whole) == 12
    seen = [index for batch in whole for _, index in batch]
    assert len(set(seen)) == 96


def test_an_epoch_can_be_entered_in_its_middle():
    batches = DistributedBatchSampler(100, 8, rank=0, world_size=1, seed=5)
    batches.start(3)
    whole = list(batches)
    batches.start(3, 7)
    assert list(batches) == whole[7:]
    assert len(batches) == 5
    batches.start(4)
    assert [i for _, i in next(iter(batches))] != [i for _, i in whole[0]]


class FirstPixel(MoCoAugmentation):
    def view(self, image, drawn, reduction=1):
        return image[:1, :1]


@pytest.mark.parametrize("step", [0, 2])
def test_a_batch_says_which_images_it_is_of(folder, step):
    """Also where an epoch is gone on with: a memory bank finds its rows by these."""
    source = FolderSource(folder, MultiCrop([FirstPixel(16, True)]), Loading(2, 5, 0, False, 0.0))
    source.start(3, step)
    order = np.random.default_rng((5, 3)).permutation(6)
    found = list(source)
    assert [batch.indices.tolist() for batch in found] == order.reshape(3, 2).tolist()[step:]
    paths = find_images(folder)
    for batch in found:
        for pixels, index in zip(batch.views[0], batch.indices, strict=True):
            image = np.array(Image.open(folder / paths[index].decode()))
            assert np.array_equal(pixels.numpy(), image[:1, :1])


# -- JPEGs decoded smaller ------------------------------------------------------------------------


def encoded_photograph(kind: str = "JPEG") -> EncodedImage:
    """600 x 800."""
    buffer = io.BytesIO()
    photo = Image.fromarray(synthetic_photograph())
    photo.resize((800, 600), Image.BICUBIC).save(buffer, kind, quality=95)
    return check_image(buffer.getvalue(), "photograph")


def decoded(monkeypatch) -> list[int]:
    """The reductions of the images that are decoded from here on."""
    reductions, decode = [], EncodedImage.decode

    def noting(self, reduction=1):
        reductions.append(reduction)
        return decode(self, reduction)

    monkeypatch.setattr(EncodedImage, "decode", noting)
    return reductions


@pytest.mark.parametrize(("size", "most"), [(16, 8), (64, 4), (128, 2), (480, 1)])
def test_an_image_is_decoded_once_no_larger_than_its_views_need(monkeypatch, size, most):
    encoded, reductions = encoded_photograph(), decoded(monkeypatch)
    augment = MoCoAugmentation(size, True)
    for seed in range(20):
        make_views(encoded, MultiCrop([augment] * 2), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        sides = [side for _ in range(2) for side in augment.draw(600, 800, rng).window[2:]]
        assert min(sides) / reductions[-1] >= size or reductions[-1] == 1
        if reductions[-1] < 8:  # twice as small would leave too little
            assert min(sides) / (2 * reductions[-1]) < OVERSAMPLING * size
    assert len(reductions) == 20
    assert max(reductions) == most


def test_a_png_is_decoded_whole(monkeypatch):
    encoded, reductions = encoded_photograph("PNG"), decoded(monkeypatch)
    make_views(encoded, MultiCrop([MoCoAugmentation(16, True)]), np.random.default_rng(0))
    assert reductions == [1]


def test_views_of_a_smaller_decoding_are_near_those_of_the_whole(monkeypatch, shared_data):
    """On photographs: the mean difference in grey levels that the documents state."""
    reductions, differences = decoded(monkeypatch), []
    crop = MoCoCrop(112, True)
    for path in sorted(shared_data("coco_mini").rglob("*.jpg"))[:30]:
        encoded = check_image(path.read_bytes(), str(path))
        whole = encoded.decode()
        for seed in range(4):
            reductions.clear()
            (view,), _ = make_views(encoded, MultiCrop([crop]), np.random.default_rng(seed))
            expected = crop(whole, np.random.default_rng(seed))
            difference = np.abs(view.pixels.astype(float) - expected.pixels).mean()
            if reductions == [1]:
                assert difference == 0
            else:
                differences.append(difference)
    assert len(differences) > 30
    assert np.mean(differences) < 1.5
    assert np.max(differences) < 4.0


def test_an_image_whose_jpeg_opencv_refuses_is_reduced_by_pillow(monkeypatch):
    encoded = encoded_photograph()
    expected = encoded.decode(4)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    ours = encoded.decode(4)
    assert ours.shape == expected.shape == (150, 200, 3)
    assert np.abs(ours.astype(float) - expected).mean() < 2


@pytest.mark.parametrize("num_views", [1, 2])
def test_crops_carry_their_looks_in_order(folder, num_views):
    whole = views_of(folder, num_views)
    crops = MultiCrop([MoCoCrop(16, True)] * num_views)
    cropped = ImageViews(folder, find_images(folder), crops, seed=3)
    samples = [cropped[(0, i)] for i in range(4)]
    views, *_ = collate_views(samples)
    expected, *_ = collate_views([whole[(0, i)] for i in range(4)])
    assert len(views) == num_views
    for number, (view, made) in enumerate(zip(views, expected, strict=True)):
        assert view.pixels.shape == (4, 16, 16, 3)
        assert view.look.shape == (4, len(Look._fields))
        assert view.look.dtype == torch.float32
        for i, (sample, *_) in enumerate(samples):
            look = Look(*sample[number].look.tolist())
            orders = look._replace(**{name: int(getattr(look, name)) for name in ORDER})
            crop = apply_look(sample[number].pixels, orders)
            assert np.abs(crop.astype(float) - made[i].numpy()).mean() < 0.5
