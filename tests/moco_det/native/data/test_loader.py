"""Which images make which batch: a slow reference and Detectron2's samplers are the oracles."""

from collections import Counter
from itertools import islice

import pytest
import record_sampling
import torch
from recording import read
from tiny_densepose import write_tiny_densepose
from tiny_voc import write_tiny_config, write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.config.checks import plan_batch
from moco_det.config.loading import get_cfg, load_config
from moco_det.datasets import get_dataset
from moco_det.datasets.dataset import count_keypoints, has_objects
from moco_det.native.data import loader
from moco_det.native.data.loader import (
    batches_by_aspect,
    build_stream,
    build_test_loader,
    build_train_loader,
    build_training_records,
    repeat_factors,
    repeating_stream,
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
        monkeypatch.setattr(loader, "rank", lambda: rank)
        monkeypatch.setattr(loader, "world_size", lambda: world_size)

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


def test_order_recorded_from_detectron2():
    stream = training_stream(len(record_sampling.records()), record_sampling.SEED)
    order = [index for _, index in take(stream, record_sampling.COUNT)]
    assert order == read("sampling")["order"]


def class_records(*classes):
    return [{"annotations": [{"category_id": label} for label in c]} for c in classes]


def test_repeat_factors_by_hand():
    """Class 0 is in 4 of 4 images, class 1 in 2, class 2 in 1; images without any count too."""
    records = class_records((0, 0), (0, 1), (1, 2, 0), (0,))
    assert repeat_factors(records, 0.5, sqrt=False).tolist() == [1, 1, 2, 1]
    assert repeat_factors(records, 1.0, sqrt=True).tolist() == pytest.approx([1, 2**0.5, 2, 1])
    assert repeat_factors(class_records((), (0,)), 2.0, sqrt=False).tolist() == [1, 4]
    assert repeat_factors(records, 0.0, sqrt=True).tolist() == [1] * 4


def test_records_come_as_often_as_their_factors_say():
    factors = torch.tensor([1.0, 2.0, 1.25, 3.5])
    epochs = 2000
    keys = take(repeating_stream(factors, seed=0), int(epochs * factors.sum()))
    assert [position for position, _ in keys] == list(range(len(keys)))
    times = Counter(index for _, index in keys)
    for index, factor in enumerate(factors.tolist()):
        assert times[index] / epochs == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("case", range(len(record_sampling.REPEATS)))
def test_repeats_recorded_from_detectron2(case):
    expected = read("sampling")["repeats"][case]
    factors = repeat_factors(record_sampling.records(), *record_sampling.REPEATS[case])
    assert factors.tolist() == expected["factors"]
    stream = repeating_stream(factors, record_sampling.SEED)
    assert [index for _, index in take(stream, record_sampling.COUNT)] == expected["order"]


def test_repeats_are_detectron2s():
    sampler = pytest.importorskip("detectron2.data.samplers").RepeatFactorTrainingSampler
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(60, 12, generator=generator) < torch.linspace(0.01, 0.4, 12)
    records = class_records(*[row.nonzero().flatten().tolist() for row in labels])
    for threshold in (0.05, 0.3):
        for sqrt in (True, False):
            factors = repeat_factors(records, threshold, sqrt)
            expected = sampler.repeat_factors_from_category_frequency(records, threshold, sqrt=sqrt)
            assert torch.equal(factors, expected)
            found = [index for _, index in take(repeating_stream(factors, 5), 500)]
            assert found == take(sampler(expected, seed=5), 500)


def test_the_config_names_the_sampler():
    cfg = get_cfg()
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    records = record_sampling.records()
    assert take(build_stream(cfg, records, 3), 50) == take(training_stream(30, 3), 50)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    for sqrt in (True, False):
        cfg.DATALOADER.REPEAT_SQRT = sqrt
        expected = repeating_stream(repeat_factors(records, 0.9, sqrt), 3)
        assert take(build_stream(cfg, records, 3), 99) == take(expected, 99)


def test_processes_share_the_stream():
    alone = take(training_batches(training_stream(7, seed=1), 4), 10)
    shares = [
        take(training_batches(training_stream(7, seed=1), 2, rank=rank, world_size=2), 10)
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


def test_batches_recorded_from_detectron2():
    golden = read("sampling")
    wide = [record["width"] > record["height"] for record in record_sampling.records()]
    batches = batches_by_aspect(enumerate(golden["order"]), wide, record_sampling.BATCH_SIZE)
    assert [[index for _, index in batch] for batch in batches] == golden["batches"]


@pytest.mark.parametrize("wide", [None, WIDE])
@pytest.mark.parametrize("repeating", [False, True])
def test_a_resumed_stream_goes_on_where_it_stopped(wide, repeating):
    def batches(start):
        factors = torch.linspace(1, 3, 7)
        stream = repeating_stream(factors, seed=2) if repeating else training_stream(7, seed=2)
        return training_batches(stream, 3, wide, start, rank=1, world_size=2)

    assert take(batches(8), 12) == take(batches(0), 20)[8:]


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize("grouping", [True, False])
def test_coco_batches_are_detectron2s(shared_data, sampler, grouping):
    """From the annotation file to the images of each batch."""
    data = pytest.importorskip("detectron2.data")
    samplers = pytest.importorskip("detectron2.data.samplers")
    load_coco_json = pytest.importorskip("detectron2.data.datasets").load_coco_json
    root = shared_data("coco_mini")
    paths = f"{root}/annotations/instances_val2017.json", f"{root}/val2017"
    data.DatasetCatalog.register("moco_det_batches", lambda: load_coco_json(*paths))
    expected = data.get_detection_dataset_dicts("moco_det_batches", check_consistency=False)
    data.DatasetCatalog.remove("moco_det_batches")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (":".join(("coco", *paths)),)
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.2
    records = build_training_records(cfg)
    assert [r["image_id"] for r in records] == [r["image_id"] for r in expected]
    theirs = samplers.TrainingSampler(len(expected), seed=9)
    if sampler != "TrainingSampler":
        factors = samplers.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        theirs = samplers.RepeatFactorTrainingSampler(factors(expected, 0.2), seed=9)
    loader = data.build_detection_train_loader(
        expected, mapper=lambda record: record, sampler=theirs, total_batch_size=4,
        aspect_ratio_grouping=grouping,
    )  # fmt: skip
    wide = [record["width"] > record["height"] for record in records] if grouping else None
    ours = training_batches(build_stream(cfg, records, 9), 4, wide)
    assert [[records[index]["image_id"] for _, index in batch] for batch in take(ours, 40)] == [
        [item["image_id"] for item in batch] for batch in take(loader, 40)
    ]


def equal_items(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


def train_loader(cfg, records, **options):
    return build_train_loader(cfg, plan_batch(cfg, loader.world_size()), records, **options)


def flat(batches, count):
    return [item for batch in take(batches, count) for item in batch]


def test_draws_depend_on_neither_workers_nor_start(cfg):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)
    reference = flat(train_loader(cfg, records, seed=3), 9)
    with_workers = flat(train_loader(cfg, records, seed=3, num_workers=2), 9)
    late = flat(train_loader(cfg, records, seed=3, start=4), 5)
    assert all(map(equal_items, reference, with_workers))
    assert all(map(equal_items, reference[4 * 2 :], late))
    other = flat(train_loader(cfg, records, seed=4), 9)
    assert not all(map(equal_items, reference, other))


def test_the_draws_of_one_image_differ_between_epochs(cfg):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)[:1]
    items = flat(train_loader(cfg, records, seed=3), 20)
    assert len({item["image"].shape for item in items}) == 2  # both sizes of MIN_SIZE_TRAIN
    assert len({item["gt_boxes"].numpy().tobytes() for item in items}) == 4  # flipped and not


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_clear_error(cfg, workers):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)
    with open(records[0]["file_name"], "wb") as file:
        file.write(b"garbage")
    with pytest.raises(UserError) as caught:
        flat(train_loader(cfg, records, seed=3, num_workers=workers), 20)
    assert "000.jpg" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_images_without_objects_are_left_out_on_request(cfg, monkeypatch):
    crowd, thing = {"iscrowd": 1}, {"iscrowd": 0}
    records = [{"annotations": a} for a in ([crowd], [crowd, thing], [], [thing])]

    class Fake:
        @staticmethod
        def records(wanted):
            return records

    monkeypatch.setattr("moco_det.native.data.loader.check_images", lambda records, problems: None)
    monkeypatch.setattr("moco_det.native.data.loader.get_dataset", lambda name: Fake)
    assert training_records(("a",), filter_empty=True) == [records[1], records[3]]
    assert len(training_records(("a", "b"), filter_empty=False)) == 8
    records[:] = [{"annotations": [crowd]}]
    with pytest.raises(UserError, match="no annotated image"):
        training_records(("a",), filter_empty=True)
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN is empty"):
        training_records((), filter_empty=True)


def test_filters_recorded_from_detectron2():
    kept, records = read("sampling")["kept"], record_sampling.records()
    assert [r["image_id"] for r in records if has_objects(r)] == kept["not_empty"]
    assert [r["image_id"] for r in records if count_keypoints(r) >= 2] == kept["two_keypoints"]


@pytest.fixture
def person_cfg(shared_data):
    root = shared_data("coco_mini")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (f"coco:{root}/annotations/person_keypoints_val2017.json:{root}/val2017",)
    return cfg


def test_images_with_few_keypoints_are_left_out_for_keypoints_only(person_cfg):
    everything = len(build_training_records(person_cfg))
    person_cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 10
    assert len(build_training_records(person_cfg)) == everything
    person_cfg.MODEL.KEYPOINT_ON = True
    records = build_training_records(person_cfg)
    assert 0 < len(records) < everything
    assert all(count_keypoints(record) >= 10 for record in records)


def test_images_without_dense_pose_are_left_out_for_dense_pose_only(tmp_path):
    name = write_tiny_densepose(tmp_path)
    kept = training_records([name], filter_empty=True, with_densepose=True)
    assert [r["image_id"] for r in kept] == [1]
    assert "dp_masks" in kept[0]["annotations"][0]
    others = training_records([name], filter_empty=True)
    assert [r["image_id"] for r in others] == [1, 2]
    assert not any(key.startswith("dp_") for key in others[0]["annotations"][0])


def test_few_keypoints_are_those_of_detectron2(person_cfg):
    build = pytest.importorskip("detectron2.data.build")
    person_cfg.MODEL.KEYPOINT_ON = True
    records = get_dataset(person_cfg.DATASETS.TRAIN[0]).records()
    expected = build.filter_images_with_only_crowd_annotations(records)
    for minimum in (1, 10, 30):
        person_cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = minimum
        found = [record["image_id"] for record in build_training_records(person_cfg)]
        left = build.filter_images_with_few_keypoints(expected, minimum)
        assert found == [record["image_id"] for record in left]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("keypoints", [False, True])
def test_only_annotations_in_use_are_held(person_cfg, masks, keypoints):
    person_cfg.MODEL.MASK_ON, person_cfg.MODEL.KEYPOINT_ON = masks, keypoints
    fields = set(build_training_records(person_cfg)[0]["annotations"][0])
    assert ("segmentation" in fields, "keypoints" in fields) == (masks, keypoints)


def test_the_global_batch_is_divided_among_the_processes(cfg, as_process):
    records = training_records(cfg.DATASETS.TRAIN, filter_empty=True)
    as_process(1, 2)
    assert all(len(batch) == 1 for batch in take(train_loader(cfg, records, seed=3), 3))
    as_process(0, 3)
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 2 .* multiple of 3 process"):
        train_loader(cfg, records, seed=3)


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


@pytest.fixture
def batches_of(cfg, monkeypatch):
    """Function: sizes of images, KEY, VALUE, ... -> the first indices of training's batches."""

    def find(sizes, *opts, start=0, count=4, processes=1, rank=0):
        monkeypatch.setattr(loader, "rank", lambda: rank)
        monkeypatch.setattr(loader, "build_train_mapper", lambda cfg: None)
        kept = {}
        monkeypatch.setattr(
            loader,
            "load",
            lambda records, batches, workers, pin_memory: kept.update(
                batches=take(batches, count), workers=workers, pin_memory=pin_memory
            ),
        )
        changed = cfg.clone()
        changed.defrost()
        changed.merge_from_list(list(opts))
        records = [{"height": h, "width": w} for h, w in sizes]
        build_train_loader(changed, plan_batch(changed, processes), records, seed=5, start=start)
        return [[index for _, index in batch] for batch in kept["batches"]]

    return find


def test_square_images_are_with_the_tall_ones(batches_of):
    """Detectron2: wide is what is wider than tall."""
    sizes = [(4, 6), (4, 4), (6, 4), (4, 4), (4, 6), (6, 4), (4, 6), (4, 4)]
    for batch in batches_of(sizes, "SOLVER.IMS_PER_BATCH", 2, count=20):
        assert len({sizes[index] == (4, 6) for index in batch}) == 1
    mixed = batches_of(sizes, "DATALOADER.ASPECT_RATIO_GROUPING", False, count=20)
    assert any(len({sizes[index] == (4, 6) for index in batch}) == 2 for batch in mixed)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_iteration_is_as_many_batches_as_it_accumulates(batches_of, accumulation, rank):
    """Iteration 3 begins where the first three have ended, on each process."""
    opts = ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.GRADIENT_ACCUMULATION_STEPS", accumulation]
    opts += ["DATALOADER.ASPECT_RATIO_GROUPING", False]
    sizes, of = [(4, 6)] * 50, {"processes": 2, "rank": rank}
    whole = batches_of(sizes, *opts, count=5 * accumulation, **of)
    later = batches_of(sizes, *opts, start=3, count=2 * accumulation, **of)
    assert later == whole[3 * accumulation :]
    assert {len(batch) for batch in whole} == {4 // accumulation}
    stream = [index for _, index in take(training_stream(50, 5), 40)]
    assert sum(whole, []) == stream[rank::2]
