import json

import pytest

from moco_det.benchmark.report.comparison import comparison
from moco_det.common.errors import UserError


def finished_run(folder, ap50):
    """An OUTPUT_DIR whose last evaluation counts, as metrics.json holds it."""
    folder.mkdir()
    lines = [
        {"iteration": 4, "bbox/AP": 1.0, "bbox/AP50": 2.0, "bbox/AP75": 0.5},
        {"iteration": 9, "bbox/AP": ap50 / 2, "bbox/AP50": ap50, "bbox/AP75": 7.0},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_rows_hold_means_and_deviations(tmp_path):
    runs = {
        "moco": [finished_run(tmp_path / "a", 50.0), finished_run(tmp_path / "b", 54.0)],
        "random": [finished_run(tmp_path / "c", 40.0)],
    }
    _, _, moco, random = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in comparison(runs).splitlines()
    ]
    # By hand: mean of 50 and 54 is 52; deviation sqrt((4 + 4) / 1) = 2.83.
    assert moco == ["moco", "2", "52.0 ± 2.8", "26.0 ± 1.4", "7.0 ± 0.0"]
    assert random == ["random", "1", "40.0", "20.0", "7.0"]


def test_every_task_has_its_columns(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    line = {"iteration": 9, "bbox/AP": 1.0, "segm/AP": 2.0, "sem_seg/mIoU": 3.0, "bbox/AP-cat": 4.0}
    (folder / "metrics.json").write_text(json.dumps(line) + "\n")
    head, _, row = comparison({"x": [folder], "y": [finished_run(tmp_path / "b", 50.0)]}).split(
        "\n"
    )[:3]
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "start", "trials", "AP50", "AP", "AP75", "mask AP", "mIoU",
    ]  # fmt: skip
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["", "1.0", "", "2.0", "3.0"]


def test_a_run_that_was_not_evaluated_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "lr": 0.1, "total_loss": 2.5}\n')
    with pytest.raises(UserError, match="holds no evaluation"):
        comparison({"moco": [tmp_path]})


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no metrics.json"):
        comparison({"moco": [tmp_path]})
