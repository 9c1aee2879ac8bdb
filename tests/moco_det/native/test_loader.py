"""Which images make which batch: a slow reference and Detectron2's samplers are the oracles."""

from collections import Counter
from itertools import islice

import pytest
import torch
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.config import load_config
from moco_det.datasets import get_dataset
from moco_det.errors import UserError
from moco_det.native import comm
from moco_det.native.loader import (
    batches_by_aspect,
    build_test_loader,
    build_train_loader,
    training_batches,
    training_records,
    training_stream,
)

WIDE = [False, True, True, False, True, True, False]


def take(iterator, count):
    return list(islice(iterator, count))


@pytest.fixture
def cfg(tmp_path):
    root = write_tiny_voc(tmp_path / "voc")
    return load_config(str(write_tiny_config(tmp_path / "tiny.yaml", root)))


@pytest.fixture
def as_process(monkeypatch):
    def become(rank, world_size):
        monkeypatch.setattr(comm, "rank", lambda: rank)
        monkeypatch.setattr(comm, "world_size", lambda: world_size)

    return become


def test_every_epoch_is_a_permutation_and_positions_count_up():
    keys = take(training_stream(7, seed=5), 21)
    assert [position for position, _ in keys] == list(range(21))
    epochs = [[index for _, index in keys[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert keys != take(training_stream(7, seed=6), 21)


def test_stream_is_detectron2s():
    samplers = pytest.importorskip("detectron2.data.samplers")
    expected = take(iter(samplers.TrainingSampler(11, seed=3)), 50)
    assert [index for _, index in take(training_stream(11, 3), 50)] == expected


def test_processes_share_the_stream():
    alone = take(training_batches(7, seed=1, batch_size=4), 10)
    shares = [
        take(training_batches(7, seed=1, batch_size=2, rank=rank, world_size=2), 10)
        for rank in (0, 1)
    ]
    for batch, first, second in zip(alone, *shares, strict=True):
        assert sorted(batch) == sorted(first + second)


def test_batches_are_wide_or_tall_and_lose_nothing():
    keys = take(training_stream(7, seed=2), 70)
    batches = list(batches_by_aspect(keys, WIDE, 3))
    assert all(len(batch) == 3 for batch in batches)
    assert all(len({WIDE[index] for _, index in batch}) == 1 for batch in batches)
    for side in (False, True):  # in the stream's order on either side
        expected = [key for key in keys if WIDE[key[1]] == side]
        grouped = [key for batch in batches for key in batch if WIDE[key[1]] == side]
        assert grouped == expected[: len(expected) // 3 * 3]


def test_grouping_is_detectron2s():
    common = pytest.importorskip("detectron2.data.common")
    keys = take(training_stream(7, seed=2), 70)
    items = [{"width": 2 if WIDE[i] else 1, "height": 1.5, "key": (p, i)} for p, i in keys]
    expected = [[item["key"] for item in b] for b in common.AspectRatioGroupedDataset(items, 3)]
    assert list(batches_by_aspect(keys, WIDE, 3)) == expected


@pytest.mark.parametrize("wide", [None, WIDE])
def test_a_resumed_stream_goes_on_where_it_stopped(wide):
    whole = take(training_batches(7, seed=2, batch_size=3, wide=wide, rank=1, world_size=2), 20)
    tail = training_batches(7, seed=2, batch_size=3, wide=wide, start=8, rank=1, world_size=2)
    assert take(tail, 12) == whole[8:]


def equal_items(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


def flat(loader, batches):
    return [item for batch in take(loader, batches) for item in batch]


def test_draws_depend_on_neither_workers_nor_start(cfg):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)
    reference = flat(build_train_loader(cfg, records, seed=3), 9)
    with_workers = flat(build_train_loader(cfg, records, seed=3, num_workers=2), 9)
    late = flat(build_train_loader(cfg, records, seed=3, start=4), 5)
    assert all(map(equal_items, reference, with_workers))
    assert all(map(equal_items, reference[4 * 2 :], late))
    other = flat(build_train_loader(cfg, records, seed=4), 9)
    assert not all(map(equal_items, reference, other))


def test_the_draws_of_one_image_differ_between_epochs(cfg):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)[:1]
    items = flat(build_train_loader(cfg, records, seed=3), 20)
    assert len({item["image"].shape for item in items}) == 2  # both sizes of MIN_SIZE_TRAIN
    assert len({item["gt_boxes"].numpy().tobytes() for item in items}) == 4  # flipped and not


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_clear_error(cfg, workers):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)
    with open(records[0]["file_name"], "wb") as file:
        file.write(b"garbage")
    with pytest.raises(UserError) as caught:
        flat(build_train_loader(cfg, records, seed=3, num_workers=workers), 20)
    assert "000.jpg" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_images_without_objects_are_left_out_on_request(cfg, monkeypatch):
    crowd, thing = {"iscrowd": 1}, {"iscrowd": 0}
    records = [{"annotations": a} for a in ([crowd], [crowd, thing], [], [thing])]

    class Fake:
        @staticmethod
        def records():
            return records

    monkeypatch.setattr("moco_det.native.loader.get_dataset", lambda name: Fake)
    assert training_records(("a",), filter_empty=True) == [records[1], records[3]]
    assert len(training_records(("a", "b"), filter_empty=False)) == 8
    records[:] = [{"annotations": [crowd]}]
    with pytest.raises(UserError, match="no annotated image"):
        training_records(("a",), filter_empty=True)
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN is empty"):
        training_records((), filter_empty=True)


def test_the_global_batch_is_divided_among_the_processes(cfg, as_process):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)
    as_process(1, 2)
    assert all(len(batch) == 1 for batch in take(build_train_loader(cfg, records, seed=3), 3))
    as_process(0, 3)
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 2 .* all 3 processes"):
        build_train_loader(cfg, records, seed=3)


def test_test_images_are_dealt_out_once(cfg, as_process):
    records = get_dataset(cfg.DATASETS.TRAIN[0]).records()
    seen = []
    for rank in range(3):
        as_process(rank, 3)
        batches = list(build_test_loader(cfg, records))
        assert all(len(batch) == 1 for batch in batches)
        seen += [batch[0] for batch in batches]
    assert [item["image_id"] for item in seen] == [record["image_id"] for record in records]
    assert set(Counter(item["image_id"] for item in seen).values()) == {1}
    assert seen[0]["image"].shape == (3, 48, 64)  # the short edge has MIN_SIZE_TEST
