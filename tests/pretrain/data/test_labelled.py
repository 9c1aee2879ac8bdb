"""iNaturalist 2018's lists, written by hand; crops against torchvision's."""

import json

import numpy as np
import pytest
import torch
from noisy_colours import write_images
from PIL import Image
from torchvision import transforms

from moco_det.common.errors import UserError
from pretrain.data.images import Loading
from pretrain.data.labelled import (
    LabelledBatches,
    LabelledImages,
    RandomCrops,
    central_part,
    centre_crop,
    class_balanced,
    find_splits,
    list_class_folders,
    listed_images,
)


def write_list(path, images: dict[int, str], labels: dict[int, int], categories=(3, 7, 12)):
    """The fields of the official lists that matter, and some that do not."""
    content = {
        "info": {"year": 2018},
        "images": [{"id": i, "file_name": name, "width": 8} for i, name in images.items()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(labels.items())
        ],
        "categories": [{"id": c, "name": f"species {c}"} for c in categories],
    }
    path.write_text(json.dumps(content))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train_val2018").mkdir()
    train = {50: "train_val2018/Aves/7/b.jpg", 51: "train_val2018/Fungi/12/c.jpg"}
    write_list(tmp_path / "train2018.json", train, {51: 12, 50: 7})
    write_list(tmp_path / "val2018.json", {9: "train_val2018/Aves/3/a.jpg"}, {9: 3})
    return tmp_path


def test_the_lists_give_paths_and_class_indices(data):
    classes, train, val = find_splits(data)
    assert classes == ["3", "7", "12"]  # in the order of the ids, not of their names
    assert train.folder == val.folder == data
    assert train.paths == ["train_val2018/Aves/7/b.jpg", "train_val2018/Fungi/12/c.jpg"]
    assert np.array_equal(train.labels, [1, 2])
    assert val.paths == ["train_val2018/Aves/3/a.jpg"]
    assert np.array_equal(val.labels, [0])


@pytest.mark.parametrize("name", ["train_val2018", "train2018.json", "val2018.json"])
def test_what_is_missing_is_named_with_its_source(data, name):
    path = data / name
    path.rmdir() if path.is_dir() else path.unlink()
    message = f"lacks {name}: download {name}.tar.gz, linked at https://github.com/visipedia/inat"
    with pytest.raises(UserError, match=message):
        find_splits(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "train2018.json is no list in COCO's format"),
        ("[]", "train2018.json is no list in COCO's format"),
        ('{"images": [], "categories": []}', "it lacks 'annotations'"),
        ('{"images": [], "categories": [{"id": "7"}], "annotations": []}', "whole numbers"),
        (
            '{"images": [{"id": 1, "file_name": 5}], "categories": [], "annotations": []}',
            "file names must be texts",
        ),
        ("[" * 100_000, "train2018.json is no list in COCO's format"),
        ('{"images": [], "categories": [], "annotations": []}', "one annotation for every image"),
    ],
    ids=["json", "list", "key", "id", "name", "nested", "empty"],
)
def test_a_file_of_another_format_is_refused(data, content, message):
    (data / "train2018.json").write_text(content)
    with pytest.raises(UserError, match=message):
        find_splits(data)


def test_an_image_without_a_label_is_refused(data):
    write_list(data / "val2018.json", {9: "a.jpg", 10: "b.jpg"}, {9: 3})
    with pytest.raises(UserError, match=r"val2018.json needs one annotation .* ids \[10\]"):
        find_splits(data)


def test_a_category_of_val_alone_is_refused(data):
    write_list(data / "val2018.json", {9: "a.jpg"}, {9: 4})
    with pytest.raises(UserError, match=r"val2018.json has categories .* \[4\]"):
        find_splits(data)


def test_neither_layout_is_said(tmp_path):
    with pytest.raises(UserError, match="needs train/CLASS and val/CLASS, or iNaturalist 2018"):
        find_splits(tmp_path)


@pytest.fixture
def uneven(tmp_path):
    """Train of 40 images of a class, 7 of another and one of a third."""
    for label, count in zip("abc", (40, 7, 1), strict=True):
        folder = tmp_path / "train" / label
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{label}{number:02d}.png").touch()
    return list_class_folders(tmp_path / "train", ["a", "b", "c"])


def test_a_share_is_that_of_each_class_and_the_seed_s(uneven):
    for share, counts in ((0.1, [4, 1, 1]), (0.5, [20, 4, 1]), (1, [40, 7, 1])):
        part = class_balanced(uneven, share, seed=3)
        assert np.bincount(part.labels).tolist() == counts
        assert part.paths == sorted(set(part.paths))
        assert [path[0] for path in part.paths] == ["abc"[label] for label in part.labels]
    draws = [class_balanced(uneven, 0.1, seed).paths for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_a_list_names_images_by_path_or_by_file(uneven, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("b06.png\n\n a/a01.png \r\ntrain/c/c00.png\nb06.png\n")
    part = listed_images(uneven, path)
    assert part.paths == ["a/a01.png", "b/b06.png", "c/c00.png"]
    assert part.labels.tolist() == [0, 1, 2]
    path.write_text(f"{uneven.folder}/a/a01.png\ntrain/a/a01.png\n")
    assert listed_images(uneven, path).paths == ["a/a01.png"]
    (uneven.folder / "a" / "same.png").touch()
    (uneven.folder / "b" / "same.png").touch()
    split = list_class_folders(uneven.folder, ["a", "b", "c"])
    for text, message in (
        ("a99.png\na98.png\na01.png", r"list\.txt has 2 .* lacks: 'a98\.png', 'a99\.png'"),
        ("same.png", r"several images called same\.png: write their paths"),
        ("\n", "lists no image"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            listed_images(split, path)


def test_training_crops_are_torchvisions_and_depend_on_seed_epoch_and_index(tmp_path):
    folder = write_images(tmp_path) / "train"
    crops = RandomCrops(list_class_folders(folder, ["a", "b"]), 32, seed=5)
    before = torch.get_rng_state()
    view, label = crops[(2, 30)]
    assert torch.equal(torch.get_rng_state(), before)
    assert label == 1
    assert np.array_equal(crops[(2, 30)][0], view)
    assert not np.array_equal(crops[(3, 30)][0], view)
    seed = np.random.SeedSequence((5, 2, 30)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))
    official = [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()]
    picture = Image.open(folder / crops.split.paths[30]).convert("RGB")
    assert np.array_equal(transforms.Compose(official)(picture), view)


@pytest.mark.parametrize("size", [(300, 400), (500, 260), (33, 40)])
def test_larger_images_are_evaluated_by_torchvision_s_crop(size):
    """The short side to 256 for crops of 224, and in this proportion for others."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for side, short in ((224, 256), (32, 37)):
        official = transforms.Compose([transforms.Resize(short), transforms.CenterCrop(side)])
        assert np.array_equal(centre_crop(image, side), np.array(official(Image.fromarray(image))))


def test_the_centre_of_a_very_long_image_is_evaluated():
    """All of 1 x 20,000 would be resized to 256 x 5,120,000: 4 GB."""
    image = np.zeros((1, 20_000, 3), np.uint8)
    image[0, 9_900:10_100] = np.random.default_rng(0).integers(0, 256, (200, 3), dtype=np.uint8)
    middle = image[:, 9_984:10_016]
    assert np.array_equal(centre_crop(image, 224), centre_crop(middle, 224))
    assert np.array_equal(central_part(image), middle)
    assert central_part(image[:, :32]).shape == (1, 32, 3)


def test_small_images_are_evaluated_whole():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(centre_crop(image, 32), image)


def test_batches_are_the_same_crops_in_every_launch_order_and_say_what_is_unreadable(tmp_path):
    folder = write_images(tmp_path) / "train"
    (folder / "a" / "03.png").write_bytes(b"broken")
    split = list_class_folders(folder, ["a", "b"])
    batches = LabelledBatches(split, 32, Loading(10, 5, 0, False, max_unreadable=0.02))
    assert (batches.samples, batches.steps_per_epoch) == (50, 5)
    batches.start(2, 1)
    loaded = list(batches)
    assert len(loaded) == 4  # the first was taken before
    order = np.random.default_rng((5, 2)).permutation(50)[10:]
    crops = RandomCrops(split, 32, seed=5)
    labels = torch.cat([labels for _, labels in loaded]).tolist()
    assert labels == [-1 if i == 3 else int(i >= 25) for i in order]
    assert np.array_equal(loaded[0][0][0].numpy(), crops[(2, order[0])][0])


def test_what_is_unreadable_comes_with_its_reason(tmp_path, monkeypatch):
    folder = write_images(tmp_path) / "train"
    Image.new("RGB", (64, 64)).save(folder / "a" / "03.png")
    images = LabelledImages(list_class_folders(folder, ["a", "b"]), 32, lambda image: image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2)  # Pillow refuses twice as many
    (found,) = images.unreadable(torch.tensor([0, images[3][1]]))
    assert "03.png: " in found
    assert "--max-image-pixels" in found
