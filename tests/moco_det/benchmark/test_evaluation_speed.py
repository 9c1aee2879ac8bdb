"""What is evaluated to measure the speed of it; how long that takes is no test."""

import itertools
import json

import pytest

from moco_det.benchmark import evaluation_speed
from moco_det.benchmark.evaluation_speed import evaluation_rates
from moco_det.common.errors import UserError

SMALL = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"]


def test_the_rate_is_of_the_images_that_one_run_has_more(repository, tmp_path):
    config = str(repository / "configs/quick/coco_mini_R18_FPN_mask.yaml")
    times = itertools.accumulate(itertools.cycle([0, 10.0, 0, 14.0]))
    rates = evaluation_rates(["native"], config, SMALL, 2, tmp_path, lambda: next(times))
    assert rates == {"native": 1.0}  # four images in four seconds
    for name, count in (("few", 2), ("many", 6)):
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["images"]) == count
        written = list((tmp_path / f"native_{name}" / "inference").glob("*.json"))
        assert written, "nothing was evaluated"


def test_a_command_that_fails_is_named(repository, tmp_path, monkeypatch):
    config = str(repository / "configs/quick/coco_mini_R18_FPN_mask.yaml")
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('error: no such thing')")
    monkeypatch.setattr(evaluation_speed, "own_file", lambda name: script)
    with pytest.raises(UserError, match="error: no such thing"):
        evaluation_rates(["native"], config, SMALL, 1, tmp_path)
