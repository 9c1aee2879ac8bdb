"""What a reproduction plans: hours, rows that lack a checkpoint, what is converted."""

from pathlib import Path

import pytest

from moco_det.benchmark.jobs import reproduction
from moco_det.benchmark.jobs.grid import load_grid
from moco_det.benchmark.jobs.reproduction import Reproduction, dry_run, estimated_hours
from moco_det.benchmark.jobs.runs import Settings

CHECKPOINTS = {name: Path("c.pth.tar") for name in ("moco_in1m", "moco_r50w2x", "mine")}


@pytest.fixture
def plan(tmp_path):
    """Function: tables, flags of classifiers -> a plan of one trial with three checkpoints."""
    grid, settings = load_grid(), Settings(tmp_path, "native")

    def make(*tables, **flags):
        given = grid, grid.select(tables), CHECKPOINTS, [1], [], settings, flags
        return Reproduction(*given)

    return make


def hours(plan):
    return {run.name.removesuffix("/trial1"): estimated_hours(run) for run in plan.runs()}


def test_hours_of_classifiers_are_those_of_a_resnet_50_and_go_with_the_epochs(plan):
    found = hours(plan("1", "A7", epochs="25"))
    assert found == {
        "imagenet_linear/moco_in1m": 16,
        "imagenet_linear/moco_r50w2x": None,
        "imagenet_linear/mine": 16,
        "imagenet_finetune/random": None,
        "imagenet_finetune/moco_in1m": None,
        "imagenet_finetune/mine": None,
    }


def test_rows_that_lack_a_checkpoint_are_those_that_the_papers_pretrain(plan):
    """Neither other methods nor what is given, nor rows of data that nobody has."""
    lacking = plan("1", "A6").rows_without_checkpoint()
    recipe = "IMAGENET --recipe configs/pretrain/moco_v1_r50.yaml"
    assert lacking == {
        "moco_rx50": f"{recipe} --arch resnext50_32x8d",
        "moco_r50w4x": f"{recipe} --arch resnet50w4x",
    }


def test_a_checkpoint_for_a_row_that_no_table_has(plan):
    assert plan("revisiting_3").rows_in_no_table() == ["moco_in1m", "moco_r50w2x"]
    assert plan("revisiting_3", "1").rows_in_no_table() == []


def test_rows_of_other_images_are_pretrained_on_them(plan):
    """Each by the command that makes the checkpoint, and none of other methods."""
    lacking = plan("revisiting_3", "revisiting_6").rows_without_checkpoint()
    assert list(lacking) == [
        "in118k_400", "coco_400", "oi118k_400", "in118k_lt_400", "bdd100k_400", "coco_200",
        "coco_200_mc",
    ]  # fmt: skip
    folders = {name: arguments.split()[0] for name, arguments in lacking.items()}
    assert folders["coco_400"] == "COCO/train2017" and folders["in118k_lt_400"] == "IMAGENET"
    text = dry_run(plan("revisiting_6"))
    assert "torchrun --nproc_per_node 8 pretrain/main.py COCO/train2017 --recipe " in text
    assert "--output output/pretrain/coco_200_mc\n" in text
    assert "segment_retrieval/mine/trial1  unknown" in text  # its hours


def test_only_detectors_start_from_converted_weights(plan, monkeypatch):
    converted = []
    monkeypatch.setattr(reproduction, "convert", lambda files, *_: converted.append(set(files)))
    monkeypatch.setattr(reproduction, "unfinished", lambda jobs: [])
    reproduction._to_do(plan("1"))
    reproduction._to_do(plan("1", "2b"))
    assert converted == [set(), {"moco_in1m", "mine"}]
    files = {run.row: run.flags["pretrained"] for run in plan("1").runs()}
    assert set(files.values()) == {"c.pth.tar"}
