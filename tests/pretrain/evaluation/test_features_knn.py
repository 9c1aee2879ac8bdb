import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco_det.common.errors import UserError
from pretrain.evaluation.features import KnnMonitor, weighted_knn
from pretrain.moco.encoders import build_encoder


@pytest.mark.usefixtures("float64")
def test_votes_are_weighted_by_similarity():
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(30, 6), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(7, 6), dim=1)
    labels = torch.arange(30) % 3
    scores = weighted_knn(bank, labels, queries, 3, k=5, temperature=0.1)
    for i, query in enumerate(queries.tolist()):
        cosines = [sum(a * b for a, b in zip(query, row, strict=True)) for row in bank.tolist()]
        nearest = sorted(range(30), key=lambda j, c=cosines: -c[j])[:5]
        for c in range(3):
            slow = sum(math.exp(cosines[j] / 0.1) for j in nearest if labels[j] == c)
            slow /= math.exp(max(cosines) / 0.1)
            assert float(scores[i, c]) == pytest.approx(slow, rel=1e-4, abs=1e-6)


def test_a_low_temperature_does_not_overflow():
    scores = weighted_knn(torch.eye(2), torch.arange(2), torch.eye(2), 2, temperature=1e-4)
    assert scores.tolist() == [[1, 0], [0, 1]]


def test_fewer_images_than_neighbours():
    bank = torch.eye(3)
    assert weighted_knn(bank, torch.arange(3), bank, 3).argmax(1).tolist() == [0, 1, 2]


def colour_folders(root, parts=("train", "val"), colours=("blue", "red")):
    for part in parts:
        for colour in colours:
            folder = root / part / colour
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.full((32, 32, 3), 20 * i, np.uint8)
                pixels[..., {"red": 0, "green": 1, "blue": 2}[colour]] = 250
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_colours_are_told_apart(tmp_path):
    monitor = KnnMonitor(colour_folders(tmp_path), 32, 0, torch.device("cpu"))
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 8).train()
    assert monitor.top1(encoder) == 100.0
    assert encoder.training


def test_the_monitor_sees_running_statistics_and_leaves_the_model_as_it_was(tmp_path):
    """Batch statistics would take val's mean colour, mostly red, from the weak red image: blue."""
    red, weak_red, blue = (250, 0, 0), (100, 0, 90), (0, 0, 250)
    splits = {
        "train": {"red": [red], "blue": [blue]},
        "val": {"red": [red, red, red, weak_red], "blue": [blue]},
    }
    for split, classes in splits.items():
        for name, colours in classes.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i, colour in enumerate(colours):
                Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
    bn, pool, head = nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Linear(3, 2)
    bn.running_mean = -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225])  # of black
    encoder = nn.Sequential(bn, pool, head).train()
    before, draws = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    assert KnnMonitor(tmp_path, 8, 0, torch.device("cpu"), k=1).top1(encoder) == 100.0
    assert all(module.training for module in encoder.modules())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    after = encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), draws)


def test_an_unreadable_image_does_not_count(tmp_path):
    data = colour_folders(tmp_path)
    (data / "val" / "red" / "0.png").write_bytes(b"broken")
    (data / "train" / "blue" / "1.png").write_bytes(b"broken")
    monitor = KnnMonitor(data, 32, 0, torch.device("cpu"))
    torch.manual_seed(0)
    assert monitor.top1(build_encoder("resnet18", 8)) == 100.0


def test_applies_where_both_parts_have_class_folders(tmp_path):
    assert not KnnMonitor.applies_to(tmp_path)
    colour_folders(tmp_path, parts=("train",))
    assert not KnnMonitor.applies_to(tmp_path)
    colour_folders(tmp_path, parts=("val",))
    assert KnnMonitor.applies_to(tmp_path)


def test_the_classes_are_those_of_train(tmp_path):
    """Val may lack one; what is hidden is none."""
    colour_folders(tmp_path)
    colour_folders(tmp_path, parts=("train",), colours=("green",))
    for part in ("train", "val"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
    monitor = KnnMonitor(tmp_path, 32, 0, torch.device("cpu"))
    assert monitor.classes == ["blue", "green", "red"]
    torch.manual_seed(0)
    assert monitor.top1(build_encoder("resnet18", 8)) == 100.0


def test_a_class_that_train_lacks_is_named(tmp_path):
    colour_folders(tmp_path)
    colour_folders(tmp_path, parts=("val",), colours=("green",))
    with pytest.raises(UserError, match="green"):
        KnnMonitor(tmp_path, 32, 0, torch.device("cpu"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_a_readable_image_is_named(tmp_path, part):
    for path in (colour_folders(tmp_path) / part).rglob("*.png"):
        path.write_bytes(b"broken")
    encoder = build_encoder("resnet18", 8).train()
    with pytest.raises(UserError, match=f"no image in .*{part} can be read"):
        KnnMonitor(tmp_path, 32, 0, torch.device("cpu")).top1(encoder)
    assert encoder.training
