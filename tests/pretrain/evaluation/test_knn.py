import copy
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fork_server import run_in_two_processes
from PIL import Image
from torch import nn

from moco_det.common.errors import UserError
from pretrain.evaluation import knn
from pretrain.evaluation.features import extract_all
from pretrain.evaluation.knn import KnnMonitor, weighted_knn
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


@pytest.mark.parametrize("bank", [700, 64])
def test_a_search_in_chunks_finds_what_brute_force_finds(monkeypatch, bank):
    monkeypatch.setattr(knn, "ROWS", 100)
    torch.manual_seed(0)
    features, queries = (
        torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (bank, 9)
    )
    labels = torch.arange(bank)  # each its own, so that they tell the neighbours
    cosines, found = knn.nearest(features, labels, queries, k=150)
    expected = (queries @ features.T).sort(dim=1, descending=True)
    count = min(150, bank)
    assert torch.equal(found[:, :count], expected.indices[:, :count])
    torch.testing.assert_close(cosines[:, :count], expected.values[:, :count])
    assert torch.isneginf(cosines[:, count:]).all()
    halved, _ = knn.nearest(features.half(), labels, queries, k=150)
    torch.testing.assert_close(halved[:, :count], cosines[:, :count], atol=1e-3, rtol=0)


def noisy_folders(root):
    """DATA of 3 classes, 37 images in train and 23 in val, that are hard to tell apart."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", (14, 12, 11)), ("val", (9, 8, 6))):
        for label, count in enumerate(counts):
            folder = root / part / "abc"[label]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(120 + 4 * label, 40, (8, 8, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


class Pixels(nn.Sequential):
    """Features are the pixels themselves."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Identity())


def monitor_of(root, **options) -> KnnMonitor:
    return KnnMonitor(root, 8, 0, torch.device("cpu"), **options)


def top1_of(rank, root, store, options, target=None, failing=None):
    """A process of two: writes the accuracy, or the error."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def fail(*arguments, **named):
        raise failing

    if rank == 1 and target:
        setattr(KnnMonitor if hasattr(KnnMonitor, target) else knn, target, fail)
    try:
        found = str(monitor_of(Path(root), **options).top1(Pixels()))
    except UserError as error:
        found = str(error)
    Path(f"{store}.{rank}").write_text(found)
    dist.destroy_process_group()


def by_two(tmp_path, root, options, *failure) -> list[str]:
    store = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
    run_in_two_processes(top1_of, str(root), str(store), options, *failure)
    return [Path(f"{store}.{rank}").read_text() for rank in (0, 1)]


@pytest.mark.parametrize("k", [1, 7, 200])
def test_two_processes_find_what_one_and_brute_force_find(tmp_path, k):
    root = noisy_folders(tmp_path / "data")
    one = monitor_of(root, k=k)
    backbone = nn.Flatten()
    bank, queries = (extract_all(backbone, part, 0, one.device) for part in (one.bank, one.queries))
    scores = weighted_knn(
        *(nn.functional.normalize(bank[0]), bank[1], nn.functional.normalize(queries[0])), 3, k=k
    )
    expected = 100.0 * int((scores.argmax(1) == queries[1]).sum()) / len(one.queries)
    assert one.top1(Pixels()) == expected
    assert 0 < expected < 100
    assert by_two(tmp_path, root, {"k": k}) == [str(expected)] * 2


def test_more_processes_than_images(tmp_path):
    root = colour_folders(tmp_path / "data", colours=("red",))
    for part in ("train", "val"):
        for name in ("1.png", "2.png"):
            (root / part / "red" / name).unlink()
    assert by_two(tmp_path, root, {}) == ["100.0"] * 2


def test_a_large_bank_is_kept_in_half_precision(tmp_path, monkeypatch):
    root = noisy_folders(tmp_path)
    expected = monitor_of(root).top1(Pixels())
    dtypes, search = [], knn.nearest
    monkeypatch.setattr(
        knn, "nearest", lambda bank, *rest: dtypes.append(bank.dtype) or search(bank, *rest)
    )
    monkeypatch.setattr(knn, "HALF_FROM", 20_000)  # bytes: train has 37 x 192 x 4, val 23 x 192 x 4
    assert monitor_of(root).top1(Pixels()) == pytest.approx(expected, abs=5)
    assert set(dtypes) == {torch.float16}


@pytest.mark.parametrize("size", [1, 20, 37, 1000])
def test_a_sampled_bank_is_a_function_of_the_seed(tmp_path, size):
    root = noisy_folders(tmp_path)
    one, again, other = (monitor_of(root, bank_size=size, seed=seed).bank for seed in (1, 1, 2))
    whole = monitor_of(root).bank.split
    assert one.split.paths == again.split.paths
    assert len(one) == min(size, 37)
    assert (one.split.paths == other.split.paths) == (size >= 37)
    labels = dict(zip(whole.paths, whole.labels, strict=True))
    assert [labels[path] for path in one.split.paths] == one.split.labels.tolist()
    assert monitor_of(root, bank_size=size, seed=1).queries.split.paths != one.split.paths
    assert 0 <= monitor_of(root, bank_size=size, seed=1).top1(Pixels()) <= 100


@pytest.mark.parametrize("target", ["_share", "nearest", "_reserve"])
@pytest.mark.parametrize(
    "failing",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_where_one_process_runs_out_of_memory_all_say_so(tmp_path, target, failing):
    root = noisy_folders(tmp_path / "data")
    said = by_two(tmp_path, root, {}, target, failing)
    assert said == [
        "out of memory while looking for neighbours: pass --knn-bank N for a smaller bank"
    ] * 2  # fmt: skip


def test_another_error_is_no_want_of_memory(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(knn, "nearest", fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        monitor_of(noisy_folders(tmp_path)).top1(Pixels())


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
    encoder = nn.Sequential(OrderedDict(bn=bn, pool=pool, fc=head)).train()
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


def test_neighbours_are_shown_as_they_were_found(tmp_path):
    """Of queries over all of val, also where they are looked for in several chunks."""
    root = noisy_folders(tmp_path / "noisy")
    (root / "val" / "a" / "0.png").write_bytes(b"broken")
    monitor, found = monitor_of(root), []
    for chunk in (1024, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knn, "QUERIES", chunk)
            monitor.top1(Pixels())
        found.append(list(monitor.found))
    assert found[0] == found[1]
    bank, queries = (
        F.normalize(extract_all(Pixels(), images, 0, torch.device("cpu"))[0], dim=1)
        for images in (monitor.bank, monitor.queries)
    )
    assert [query for query, _ in found[0]] == [1, 8, 15, 22]  # of 22, without the broken one
    for query, neighbours in found[0]:
        cosines, near = (queries[query] @ bank.T).topk(knn.NEIGHBOURS)
        assert [number for _, number in neighbours] == near.tolist()
        assert [cosine for cosine, _ in neighbours] == pytest.approx(cosines.tolist())
    pixels = monitor.draw_neighbours()
    assert pixels.shape == (4 * 140, 7 * 112, 3)
    tile, _ = monitor._tile(monitor.bank, found[0][1][1][2][1], "")
    assert (pixels[140:252, 3 * 112 : 4 * 112] == tile).all()
    (root / "val" / "a" / "1.png").unlink()
    assert monitor.draw_neighbours() is None  # nothing that a run must end of
