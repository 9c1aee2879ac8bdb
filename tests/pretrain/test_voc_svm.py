"""The SVMs of VOC's classes as a command: its mAP is a direct computation's."""

import json
import sys

import numpy as np
import pytest
import torch
from noisy_colours import slow_features
from sklearn.metrics import precision_recall_curve
from sklearn.svm import LinearSVC

from moco_det.common.errors import UserError
from pretrain.flags.evaluation import parse_voc_svm
from pretrain.voc_svm import evaluate

CPU = torch.device("cpu")
FLAGS = ["-a", "resnet18", "--image-size", "32", "-j", "0"]


@pytest.fixture(scope="module")
def voc(images, tmp_path_factory):
    """The noisy images as VOC, and their labels: of class a, and of one that is hard to tell."""
    root, rng, labels = tmp_path_factory.mktemp("voc"), np.random.default_rng(0), {}
    main = root / "ImageSets" / "Main"
    for folder in (main, root / "JPEGImages"):
        folder.mkdir(parents=True)
    for split, part in (("trainval", "train"), ("test", "val")):
        files = [path for c in "ab" for path in sorted((images / part / c).iterdir())]
        names = [f"{part}_{path.parent.name}_{path.stem}" for path in files]
        for path, name in zip(files, names, strict=True):
            (root / "JPEGImages" / f"{name}.png").write_bytes(path.read_bytes())
        warm = np.array([1 if path.parent.name == "a" else -1 for path in files])
        other = np.where(rng.random(len(files)) < 0.3, 1, -1)
        other[rng.random(len(files)) < 0.1] = 0
        labels[split] = np.stack([other, warm], axis=1)
        for column, name in enumerate(("other", "warm")):
            lines = (f"{n} {v}\n" for n, v in zip(names, labels[split][:, column], strict=True))
            (main / f"{name}_{split}.txt").write_text("".join(lines))
    return root, labels


def test_the_map_is_a_direct_computation_s(voc, images, pretrained, tmp_path, capsys):
    root, labels = voc
    x, queries = (slow_features(pretrained, images / part)[0] for part in ("train", "val"))
    x, queries = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, queries))
    aps = []
    for column in range(2):
        y, truth = labels["trainval"][:, column], labels["test"][:, column]
        machine = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0)
        scores = machine.fit(x[y != 0], y[y != 0]).decision_function(queries[truth != 0])
        precision, recall, _ = precision_recall_curve(truth[truth != 0], scores, pos_label=1)
        envelope = np.maximum.accumulate(precision)[:-1]
        aps.append(-100 * np.sum(np.diff(recall) * envelope))
    path = tmp_path / "svm.json"
    argv = [str(root), "--pretrained", str(pretrained), *FLAGS, "--output", str(path)]
    evaluate(parse_voc_svm(argv), CPU)
    written = json.loads(path.read_text())
    assert written["voc_svm_ap_other"] == pytest.approx(aps[0], abs=0.5)
    assert written["voc_svm_ap_warm"] == pytest.approx(aps[1], abs=0.5)
    assert written["voc_svm_map"] == pytest.approx(np.mean(aps), abs=0.5)
    assert f"mAP {written['voc_svm_map']:.2f} %  (2 classes)" in capsys.readouterr().out
    assert aps[0] < 60 < aps[1]  # one class is learnt, the other is noise


def test_bad_input_is_named(voc, pretrained, tmp_path, monkeypatch):
    root, _ = voc
    for data, more, message in (
        (tmp_path, [], "no VOC in"),
        (root, ["--cost", "0"], "--cost must be above 0"),
        (root, ["--cost", "2", "--cross-validate"], "drop it, or --cost"),
        (root, ["--output", "absent/svm.json"], "there is no folder absent"),
        (root, ["--test-split", "val"], r"lacks other_val\.txt"),
    ):
        with pytest.raises(UserError, match=message):
            argv = [str(data), "--pretrained", str(pretrained), *FLAGS, *more]
            evaluate(parse_voc_svm(argv), CPU)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(UserError, match=r"by SVM needs the package scikit-learn: .*evaluation"):
        evaluate(parse_voc_svm([str(root), "--pretrained", str(pretrained), *FLAGS]), CPU)
