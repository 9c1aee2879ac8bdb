"""Output folders of the version before: they resume, convert and report as they did there."""

import json
import pickle
import shutil

import numpy as np
import pytest
from commands import run
from paths import REPOSITORY
from previous_runs import COMMANDS, CONVERT, read_metrics, resume_command, summary, write_data
from recording import FOLDER

RECORDED = json.loads((FOLDER / "previous_version" / "runs.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the commands are run in, with the runs and the data that they name."""
    write_data(tmp_path)
    shutil.unpack_archive(FOLDER / "previous_version" / "runs.tar.xz", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(command, codes=(0,)) -> str:
    done = run(*command)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


# What checkpoints hold since then.
ADDED = {
    "/config/max_image_pixels", "/config/warmup_epochs", "/data/images", "/data/hash",
    "/numbered_from", "/config/nearest_neighbours", "/config/nn_weight", "/config/nn_from_epoch",
    "/config/dataset", "/config/download", "/config/list", "/config/train_share",
    "/config/multi_crop", "/config/small_size",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_it_goes_on_as_in_the_version_before(folder, name):
    before = len(read_metrics(folder, name))
    finished(resume_command(name, REPOSITORY))
    found, expected = summary(folder, name, before), RECORDED[name]
    assert expected["values"].items() <= found["values"].items()
    assert found["values"].keys() - expected["values"].keys() <= ADDED
    assert len(found["losses"]) == len(expected["losses"]) > 0
    # Between a processor's best instructions and none rounding made 2e-10 of a loss in float64;
    # in the detector's float32 1e-7 of a loss, and 1e-3 of a momentum.
    loss_bound, norm_bound = (1e-5, 1e-2) if name == "detector" else (1e-6, 1e-6)
    assert found["losses"] == pytest.approx(expected["losses"], rel=loss_bound)
    assert found["norms"].keys() == expected["norms"].keys()
    for key, norm in expected["norms"].items():
        assert found["norms"][key] == pytest.approx(norm, rel=norm_bound), key


def test_it_is_converted_to_the_same_arrays(folder):
    finished([*CONVERT, "again.pkl"])
    found, expected = (pickle.loads((folder / n).read_bytes()) for n in ("again.pkl", "moco.pkl"))
    arrays, others = found.pop("model"), expected.pop("model")
    assert found == expected
    assert list(arrays) == list(others)
    for name, array in others.items():
        assert arrays[name].dtype == array.dtype, name
        assert np.array_equal(arrays[name], array), name


def test_it_is_reported_as_before(folder):
    *findings, count = finished(["pretrain/doctor.py", "moco"], codes=(0, 1)).splitlines()
    *known, _ = RECORDED["doctor"].splitlines()
    new = [finding for finding in findings if finding not in known]
    assert [finding for finding in findings if finding in known] == known
    assert ["the queue never fills" in finding for finding in new] == [True]
    assert count == f"{len(known) + 1} problems"
    assert finished(["tools/compare.py", "moco=finished"]) == RECORDED["compare"]
