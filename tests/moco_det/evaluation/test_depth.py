"""The error of depths against a plain loop, and by hand."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_nyud import SIZE, write_tiny_nyud

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.datasets.depth import encode_depth
from moco_det.evaluation import evaluate, print_table, rehearse, verify_results
from moco_det.evaluation.predictions import prediction_record, read_predictions, save_predictions


@pytest.fixture
def dataset(tmp_path):
    return get_dataset(f"nyud_depth:{write_tiny_nyud(tmp_path / 'nyud')}:train")


def predictions_of(dataset, depths_of):
    return [
        prediction_record(
            r["image_id"], {"depth": torch.from_numpy(depths_of(dataset.read_map(r)))}
        )
        for r in dataset.records()
    ]


def test_all_pixels_of_the_set_count_alike(dataset):
    """Not the mean of the images' errors: one image here is measured in a single row."""
    record = dataset.records()[0]
    depths = dataset.read_map(record)
    depths[1:] = 0
    np.save(record["depth_file_name"], depths)
    rng = np.random.default_rng(0)
    guesses = [rng.integers(0, 6000, SIZE).astype(np.float32) / 1000 for _ in range(3)]
    squares = []
    for one, guess in zip(dataset.records(), guesses, strict=True):
        measured = dataset.read_map(one)
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                if measured[y, x] > 0:
                    squares.append((float(guess[y, x]) - float(measured[y, x])) ** 2)
    turn = iter(guesses)
    results = evaluate(dataset, predictions_of(dataset, lambda _: next(turn)))
    assert results == {"depth": {"rmse": pytest.approx(math.sqrt(sum(squares) / len(squares)))}}


def test_by_hand(dataset, capsys):
    off = predictions_of(dataset, lambda depths: depths + 0.25)
    results = evaluate(dataset, off)
    assert results["depth"]["rmse"] == pytest.approx(0.25, abs=1e-3)
    print_table(results)
    assert "copypaste: rmse\ncopypaste: 0.2500" in capsys.readouterr().out
    verify_results([["depth", "rmse", 0.25, 0.001]], results)
    with pytest.raises(UserError, match="depth/rmse is 0.25, expected 0.2"):
        verify_results([["depth", "rmse", 0.2, 0.01]], results)
    assert evaluate(dataset, off[1:2], only={"0002"})["depth"]["rmse"] == pytest.approx(
        0.25, abs=1e-3
    )
    # Without a prediction, and below it, everything is at 0 m.
    zero = evaluate(dataset, predictions_of(dataset, lambda depths: -depths))
    assert evaluate(dataset, [])["depth"]["rmse"] == zero["depth"]["rmse"] > 2
    for record in dataset.records():
        np.save(record["depth_file_name"], np.zeros(SIZE, np.float32))
    assert math.isnan(evaluate(dataset, off)["depth"]["rmse"])


def test_predictions_that_do_not_fit(dataset):
    (first, *_) = predictions_of(dataset, lambda depths: depths)
    with pytest.raises(ValueError, match="not in the data set"):
        evaluate(dataset, [{**first, "image_id": "9"}])
    with pytest.raises(
        ValueError, match=r"image 0001: depths are of size \[4, 4\], not \[48, 64\]"
    ):
        evaluate(dataset, [{**first, "depth": encode_depth(np.ones((4, 4)))}])
    with pytest.raises(ValueError, match="2 predictions for 1 images"):
        evaluate(dataset, [first, first])


def test_predictions_come_back_from_their_file(dataset, tmp_path):
    found = predictions_of(dataset, lambda depths: depths + 1)
    save_predictions(str(tmp_path), "x", found)
    path = tmp_path / "inference" / "x.json"
    read = read_predictions(path, dataset)
    assert read == {p["image_id"]: {"depth": p["depth"]} for p in found}
    broken = json.loads(path.read_text())
    broken[1]["depth"]["size"] = [1, 1]
    path.write_text(json.dumps(broken))
    with pytest.raises(UserError, match="image 0002: a predicted depth map is no PNG of 16 bits"):
        read_predictions(path, dataset)
    path.write_text('[{"image_id": "0001", "sem_seg": []}]')
    with pytest.raises(UserError, match="does not hold predicted depth maps"):
        read_predictions(path, dataset)


def test_what_cannot_be_scored_is_found_before(dataset):
    records = dataset.records()
    rehearse(dataset, records)
    np.save(records[1]["depth_file_name"], np.full(SIZE, np.nan))
    with pytest.raises(UserError, match="0002.npy has a depth that is not finite"):
        rehearse(dataset, records)
