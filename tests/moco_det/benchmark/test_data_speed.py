"""What the benchmarks of data measure, on little of it; how long that takes is no test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import synthetic_photograph
from PIL import Image
from torchvision import transforms

from moco_det.benchmark import data_speed
from moco_det.common.errors import UserError
from moco_det.datasets import CocoDataset
from pretrain.data.images import ImageViews


@pytest.fixture
def images(tmp_path) -> Path:
    for number in range(2):
        Image.fromarray(synthetic_photograph()).save(tmp_path / f"{number}.jpg")
    return tmp_path


def test_all_ways_load_the_same_images(images, monkeypatch):
    threads, loaded = torch.get_num_threads(), []
    load = ImageViews.__getitem__

    def noting(self, key):
        sample = load(self, key)
        loaded.append((key[1], type(sample.views[0])))
        return sample

    monkeypatch.setattr(ImageViews, "__getitem__", noting)
    try:
        seconds = data_speed.data_path(images, 32, rounds=1)
    finally:
        torch.set_num_threads(threads)
    assert seconds.keys() == {"reference", "cpu", "device"}
    assert min(seconds.values()) > 0
    assert len(set(loaded)) == 4  # both images, as views and as crops that lack their looks
    assert len(loaded) == 8  # an untimed round and one more


def test_an_unreadable_image_is_an_error(images):
    threads = torch.get_num_threads()
    (images / "1.jpg").write_bytes(b"broken")
    try:
        with pytest.raises(UserError, match=r"unreadable image in --images: .*1\.jpg"):
            data_speed.data_path(images, 32, rounds=1)
    finally:
        torch.set_num_threads(threads)


def test_looks_are_given_to_both_views_of_a_batch(monkeypatch):
    shapes, finish = [], data_speed.finished
    monkeypatch.setattr(
        data_speed, "finished", lambda *args: shapes.append(finish(*args).shape) or finish(*args)
    )
    assert data_speed.looks(16, 3, "cpu", rounds=1)["plain"] > 0
    assert shapes == [(3, 16, 16, 3)] * 4


@pytest.mark.parametrize(("half_from", "ratio"), [(10**9, 1), (0, 2)])
def test_a_drawn_bank_is_searched_as_the_monitor_does(monkeypatch, half_from, ratio):
    monkeypatch.setattr(data_speed, "HALF_FROM", half_from)
    cost = data_speed.knn_bank(300, 16, queries=20, classes=3, k=7, device="cpu")
    assert cost.float32 == 300 * 16 * 4 == ratio * cost.held
    assert cost.agreement > 0.9
    assert cost.seconds > 0


def test_drawn_annotations_are_coco(tmp_path):
    with data_speed.drawn_annotations(20, 50) as file:
        content = json.loads(file.read_text())
        records = CocoDataset.open("it", file, str(file.parent)).records()
    assert not file.exists()
    assert len(records) == 20
    assert sum(len(record["annotations"]) for record in records) == 50
    assert len(content["categories"]) == 80
    (polygon,) = content["annotations"][7]["segmentation"]
    x, y, width, height = content["annotations"][7]["bbox"]
    assert [x, y] == pytest.approx([min(polygon[::2]), min(polygon[1::2])])
    assert [x + width, y + height] == pytest.approx([max(polygon[::2]), max(polygon[1::2])])


@pytest.mark.usefixtures("forked_launches")
def test_several_processes_hold_what_one_holds():
    with data_speed.drawn_annotations(1500, 10_000) as file:
        one, two = (data_speed.annotation_memory(file, processes) for processes in (1, 2))
    assert one.peak >= one.held > 2**22  # 10,000 objects
    assert two.held < 1.3 * one.held + 2**23  # a process's own few MB weigh more here
    assert two.peak < 1.3 * one.peak + 2**23


@pytest.mark.usefixtures("forked_launches")
def test_a_broken_file_is_one_error(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read COCO annotations .*a\.json"):
        data_speed.annotation_memory(tmp_path / "a.json", 2)


def test_memory_that_is_shared_counts_once():
    """By the kernel's proportional share: this process alone."""

    class Own:
        pid = "self"

    before = data_speed._memory([(Own, None)])
    kept = np.ones(2**25, np.uint8)
    assert data_speed._memory([(Own, None)]) - before == pytest.approx(kept.nbytes, rel=0.2)


def test_the_data_path_is_timed_for_each_image(monkeypatch, tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(
        data_speed, "alternate", lambda steps, rounds, clock: dict.fromkeys(steps, 6.0)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(data_speed.cv2, "setNumThreads", lambda count: None)
    assert data_speed.data_path(tmp_path, 16, 2) == dict.fromkeys(
        ("reference", "cpu", "device"), 2.0
    )


# -- references -----------------------------------------------------------------------------------


def test_the_reference_of_the_data_path_is_the_official_recipe():
    crop, jitter, grey, blur, flip, _, normalise = data_speed.official_transform(48).transforms
    assert (crop.size, crop.scale, crop.ratio) == ((48, 48), (0.2, 1.0), (3 / 4, 4 / 3))
    (colours,) = jitter.transforms
    factors = (colours.brightness, colours.contrast, colours.saturation, colours.hue)
    assert factors == (*[(0.6, 1.4)] * 3, (-0.1, 0.1))
    assert (jitter.p, grey.p, blur.p, flip.p) == (0.8, 0.2, 0.5, 0.5)
    assert isinstance(grey, transforms.RandomGrayscale)
    np.testing.assert_allclose(normalise.mean, [0.485, 0.456, 0.406])
    np.testing.assert_allclose(normalise.std, [0.229, 0.224, 0.225])
