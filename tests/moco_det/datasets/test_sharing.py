"""What processes of one machine share, and what they hear of each other's errors."""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from fork_server import run_in_two_processes
from tiny_coco import tiny_coco, write_tiny_coco
from torch.utils.data import DataLoader

from moco_det.common.errors import UserError
from moco_det.config.loading import get_cfg
from moco_det.datasets import coco, get_dataset, read_categories_together, sharing
from moco_det.datasets.sharing import PackedList, once_per_machine, shared_list
from moco_det.native.data.loader import build_training_records, shared_training_records

ITEMS = [{"id": 3, "polygon": [1.5, 2.5]}, None, "text", [], {"nested": {"a": (1, 2)}}]


@pytest.fixture(params=["shared", "private"])
def kind(request, monkeypatch):
    """A block that can be shared, and one where that is forbidden."""
    if request.param == "private":

        def forbid(name: str) -> int:
            raise PermissionError(name)

        monkeypatch.setattr(os, "memfd_create", forbid)
    return request.param


@pytest.mark.parametrize("items", [ITEMS, [], [b"x" * 5], list(range(1000))])
def test_a_packed_list_holds_what_was_packed(kind, items):
    packed = PackedList.of(iter(items), notes={"wide": [True, False]})
    assert len(packed) == len(items)
    assert list(packed) == items
    assert [packed[i - len(items)] for i in range(len(items))] == items
    assert packed.notes == {"wide": [True, False]}
    for outside in (len(items), -len(items) - 1):
        with pytest.raises(IndexError, match=f"item {outside} of a list of {len(items)}"):
            packed[outside]


def test_an_item_is_new_each_time():
    packed = PackedList.of(ITEMS)
    packed[0]["polygon"].append(9)
    assert packed[0] == ITEMS[0]


def test_numpys_numbers_are_places(kind):
    assert PackedList.of(ITEMS)[np.int64(2)] == "text"


def test_a_packed_list_is_handed_over_without_its_content(kind):
    packed = PackedList.of(["x" * 100_000])
    handed = pickle.dumps(packed)
    assert (len(handed) < 500) == (kind == "shared")
    assert list(pickle.loads(handed)) == list(packed)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loading_processes_read_it(kind, method):
    if kind == "private" and method == "spawn":
        pytest.skip("the new process has memfd again")
    packed = PackedList.of(range(20))
    context = multiprocessing.get_context(method)
    loader = DataLoader(packed, num_workers=2, batch_size=5, multiprocessing_context=context)
    assert [number for batch in loader for number in batch.tolist()] == list(range(20))


def test_nothing_stays_of_a_list_that_is_forgotten():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    packed = PackedList.of(ITEMS)
    assert descriptors() > before
    assert not any("moco_det" in name for name in os.listdir("/dev/shm"))
    del packed
    gc.collect()
    assert descriptors() == before


def in_a_group(rank: int, store: str, body, *arguments) -> None:
    """Write what `body` returns in this one of two processes, or its error."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        found = body(rank, *arguments)
    except UserError as error:
        found = f"error: {error}"
    Path(f"{store}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def by_two(tmp_path, body, *arguments) -> list:
    store = tmp_path / "store"
    run_in_two_processes(in_a_group, str(store), body, *arguments)
    return [json.loads(Path(f"{store}.{rank}").read_text()) for rank in (0, 1)]


def share(rank: int, hidden: bool = False) -> list:
    """Who has made the list that this process has, and where it is mapped from."""
    if hidden and rank == 1:
        sharing.PackedList.at = classmethod(lambda *_: os.open("/nowhere", os.O_RDONLY))

    def make() -> PackedList:
        return PackedList.of([{"made by": rank}] * 3, notes="noted")

    with contextlib.redirect_stdout(io.StringIO()) as said:
        packed = shared_list(make)
    return [packed[2]["made by"], len(packed), packed.notes, said.getvalue()]


def test_one_process_makes_what_both_have(tmp_path):
    assert by_two(tmp_path, share) == [[0, 3, "noted", ""]] * 2


def test_where_it_cannot_be_mapped_a_process_makes_its_own_and_says_so(tmp_path):
    said = (
        "process 1 reads the annotations itself: it cannot share those of process 0: "
        "No such file or directory\n"
    )
    assert by_two(tmp_path, share, True) == [[0, 3, "noted", ""], [1, 3, "noted", said]]


def fail(rank: int, elsewhere: bool) -> None:
    if elsewhere:  # each on a machine of its own
        sharing._first_of_machine = lambda: rank

    def make() -> PackedList:
        if rank == (1 if elsewhere else 0):
            raise UserError("a.json is broken")
        return PackedList.of([])

    shared_list(make)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_all_processes_hear_of_an_error(tmp_path, elsewhere):
    assert by_two(tmp_path, fail, elsewhere) == ["error: a.json is broken"] * 2


def check(rank: int, wrong: bool) -> list:
    """How often this process checks."""
    calls = []

    def look(name: str) -> None:
        calls.append(name)
        if wrong:
            raise UserError(f"{name} is absent")

    once_per_machine(look, "a.jpg")
    return calls


def test_a_check_is_made_once(tmp_path):
    assert by_two(tmp_path, check, False) == [["a.jpg"], []]


def test_a_failed_check_is_everyones(tmp_path):
    assert by_two(tmp_path, check, True) == ["error: a.jpg is absent"] * 2


def test_alone_nothing_is_exchanged():
    assert list(shared_list(lambda: PackedList.of(ITEMS))) == ITEMS
    assert check(0, False) == ["a.jpg"]
    with pytest.raises(UserError, match="absent"):
        check(0, True)


# -- of an annotation file -------------------------------------------------------------------------


def read_file(rank: int, name: str) -> list:
    """How often this process reads the file for its training records, and what it then has."""
    parsed, load = [], coco.load_coco

    def counting(path):
        parsed.append(path)
        return load(path)

    coco.load_coco = counting
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    read_categories_together(cfg.DATASETS.TRAIN)
    records = shared_training_records(cfg)
    classes = get_dataset(name).classes
    return [len(parsed), classes, list(records), records.notes.wide]


def test_one_process_reads_a_coco_file_and_both_have_its_records(tmp_path):
    name = write_tiny_coco(tmp_path / "data", tiny_coco())
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    expected = [["red", "green"], build_training_records(cfg), [True, True]]
    first, second = by_two(tmp_path, read_file, name)
    assert first == [2, *expected]
    assert second == [0, *expected]


@pytest.mark.parametrize("content", ["{", '{"images": [], "annotations": [7], "categories": []}'])
def test_a_broken_file_is_told_by_both_processes_in_the_same_line(tmp_path, content):
    name = write_tiny_coco(tmp_path / "data", tiny_coco())
    (tmp_path / "data" / "a.json").write_text(content)
    first, second = by_two(tmp_path, read_file, name)
    assert first == second
    assert first.startswith("error: ")
    assert "a.json" in first
    assert "\n" not in first


def test_a_file_that_changes_is_read_anew(tmp_path):
    content = tiny_coco()
    name = write_tiny_coco(tmp_path, content)
    assert get_dataset(name).classes == ("red", "green")
    content["categories"][0]["name"] = "crimson"
    write_tiny_coco(tmp_path, content)
    assert get_dataset(name).classes == ("crimson", "green")
