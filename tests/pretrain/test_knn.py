"""The kNN classifier as a command."""

import json

import numpy as np
import pytest
import torch
from commands import python
from noisy_colours import slow_features
from sklearn.neighbors import KNeighborsClassifier

from moco_det.common.errors import UserError
from pretrain.flags.evaluation import parse_knn
from pretrain.knn import classify


def flags(images, pretrained, *more):
    data = [str(images), "--pretrained", str(pretrained), "-a", "resnet18", "-j", "0"]
    return [*data, "--image-size", "32", *more]


@pytest.mark.parametrize(
    ("k", "sigma"), [(1, 0.07), (7, 0.07), (7, 10.0), (20, 10.0), (200, 0.002)]
)
def test_the_accuracy_is_scikit_learns(images, pretrained, capsys, k, sigma):
    x, y = slow_features(pretrained, images / "train")
    queries, truth = slow_features(pretrained, images / "val")
    official = KNeighborsClassifier(
        min(k, len(x)), metric="cosine", weights=lambda d: np.exp((1 - d) / sigma - 1 / sigma)
    )
    expected = 100 * official.fit(x, y).score(queries, truth)
    argv = flags(images, pretrained, "-k", str(k), "--sigma", str(sigma))
    classify(parse_knn(argv), torch.device("cpu"))
    said = capsys.readouterr().out
    assert f"kNN top-1 {expected:.2f} %" in said
    assert (f"-k {k} is more than there are images: all {len(x)} vote" in said) == (k > len(x))


def test_the_accuracy_can_be_written(images, pretrained, tmp_path, capsys):
    path = tmp_path / "knn.json"
    argv = flags(images, pretrained, "--neighbours", "7", "--output", str(path))
    classify(parse_knn(argv), torch.device("cpu"))
    written = json.loads(path.read_text())
    assert f"kNN top-1 {written['knn_top1']:.2f} %" in capsys.readouterr().out
    assert (written["k"], written["temperature"]) == (7, 0.07)


def test_bad_input_is_named(images, pretrained):
    for more, message in (
        (["-a", "resnet34"], "pass -a resnet18"),
        (["--sigma", "0"], "--temperature must be above 0"),
        (["-k", "0"], "--neighbours and --image-size"),
    ):
        with pytest.raises(UserError, match=message):
            classify(parse_knn(flags(images, pretrained, *more)), torch.device("cpu"))


def test_a_missing_val_is_one_line_without_traceback(images, pretrained):
    done = python("pretrain/knn.py", *flags(images / "train", pretrained))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "train/CLASS and val/CLASS" in done.stderr
