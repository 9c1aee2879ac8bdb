"""One call for all data sets: which metrics come of which predictions, and their table."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate, print_table, verify_results
from moco_det.evaluation.predictions import prediction_record


@pytest.fixture
def semantic(tmp_path):
    """Two images of VOC's layout, of background and aeroplane."""
    labels = np.zeros((4, 6), dtype=np.uint8)
    labels[:, 3:] = 1
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (6, 4)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(labels).save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\n")
    return get_dataset(f"voc_sem_seg:{tmp_path}:val")


def prediction(image_id, columns):
    """Of a model that is sure of a label for each column of pixels."""
    labels = torch.tensor([int(label) for label in columns])
    scores = torch.nn.functional.one_hot(labels, 21).T[:, None].expand(-1, 4, -1)
    return prediction_record(image_id, {"sem_seg": scores.float()})


def test_a_semantic_set_is_scored_by_its_pixels(semantic):
    """By hand: one column of six is wrong, in one of two images."""
    found = evaluate(semantic, [prediction("a", "000111"), prediction("b", "000011")])
    assert set(found) == {"sem_seg"}
    metrics = found["sem_seg"]
    assert metrics["pACC"] == pytest.approx(100 * 11 / 12)
    assert metrics["mIoU"] == pytest.approx(100 * (6 / 7 + 5 / 6) / 2)


def test_the_table_of_a_semantic_set(semantic, capsys):
    found = evaluate(semantic, [prediction("a", "000111"), prediction("b", "000111")])
    print_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Results for sem_seg:"
    assert [name for name in ("mIoU", "fwIoU", "mACC", "pACC") if name in lines[1]] == [
        *("mIoU", "fwIoU", "mACC", "pACC")
    ]
    assert any(line.startswith("| category") and "IoU" in line for line in lines)
    assert any("aeroplane" in line and "100.000" in line for line in lines)
    assert lines[-1] == "copypaste: 100.0000,100.0000,100.0000,100.0000"


def test_the_table_of_several_tasks(capsys):
    print_table({"bbox": {"AP": 12.5, "AP-ant": 1.25}, "segm": {"AP": 25.0, "APr": float("nan")}})
    out = capsys.readouterr().out
    assert out.index("Results for bbox:") < out.index("Results for segm:")
    assert "copypaste: Task: segm\ncopypaste: AP,APr\ncopypaste: 25.0000,nan\n" in out
    assert out.count("| category") == 1


def test_two_predictions_of_one_image_are_refused(semantic):
    with pytest.raises(ValueError, match="2 predictions for 1 images"):
        evaluate(semantic, [prediction("a", "000111")] * 2)


@pytest.mark.parametrize(
    ("actual", "met"), [(40.0, True), (38.5, True), (41.5, True), (38.4, False), (41.6, False)]
)
def test_expected_results_are_met_within_their_tolerance_on_both_sides(actual, met, capsys):
    expected, results = [["bbox", "AP", 40.0, 1.5]], {"bbox": {"AP": actual}}
    if met:
        verify_results(expected, results)
        assert "TEST.EXPECTED_RESULTS met" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=rf"bbox/AP is {actual}, expected 40.0 \+- 1.5"):
            verify_results(expected, results)


@pytest.mark.parametrize("results", [{}, {"bbox": {}}, {"bbox": {"AP": float("nan")}}])
def test_an_expected_result_that_is_absent_is_missed(results):
    with pytest.raises(UserError, match="bbox/AP is nan"):
        verify_results([["bbox", "AP", 40.0, 1.5]], results)
