"""SVMs of several classes: AP by hand, costs and mAP against scikit-learn's own."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from moco_det.common.errors import UserError
from pretrain.evaluation import svm
from pretrain.evaluation.svm import average_precision, choose_cost, classify, classify_all

SETTING = {
    "class_weight": {1: 2, -1: 1}, "loss": "squared_hinge", "tol": 1e-4, "max_iter": 2000,
    "random_state": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("positive", "scores", "expected"),
    [
        ([1, 0, 1, 0], [4, 3, 2, 1], 0.5 * 1 + 0.5 * 2 / 3),
        ([0, 1, 0, 1], [4, 3, 2, 1], 0.5 * 0.5 + 0.5 * 0.5),
        ([0, 1, 1, 0], [4, 3, 2, 1], 2 / 3),  # a later, higher precision holds before it as well
        ([1, 1, 0], [1, 1, 1], 2 / 3),  # equal scores come in together, in whatever order
        ([0, 1, 1], [1, 1, 1], 2 / 3),
        ([1], [0], 1),
    ],
)
def test_the_average_precision_is_the_area_worked_by_hand(positive, scores, expected):
    found = average_precision(np.array(positive, bool), np.array(scores, float))
    assert found == pytest.approx(expected, abs=1e-12)


def interpolated(truth, scores) -> float:
    """By scikit-learn's curve, whose recall falls."""
    precision, recall, _ = precision_recall_curve(truth, scores)
    return -np.sum(np.diff(recall) * np.maximum.accumulate(precision)[:-1])


def test_the_average_precision_is_that_of_scikit_learn_s_curve():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, scores = rng.random(60) < 0.3, rng.integers(0, 25, 60).astype(float)
        assert average_precision(truth, scores) == pytest.approx(interpolated(truth, scores))
        assert average_precision(truth, scores) >= average_precision_score(truth, scores) - 1e-12


@pytest.fixture(scope="module")
def splits():
    """Features and labels of three classes; some images are difficult ones."""
    rng = np.random.default_rng(1)
    found = []
    for count in (90, 60):
        labels = np.where(rng.random((count, 3)) < 0.3, 1, -1)
        features = rng.normal(size=(count, 8)) + labels @ rng.normal(size=(3, 8)) / 3
        labels[rng.random(labels.shape) < 0.1] = 0
        found.append((features / np.linalg.norm(features, axis=1, keepdims=True), labels))
    return found


def direct(train, test, cost, column, difficult="ignored") -> float:
    (x, y), (queries, truth) = train, test
    y, truth = y[:, column], truth[:, column]
    if difficult == "ignored":
        x, y, queries, truth = x[y != 0], y[y != 0], queries[truth != 0], truth[truth != 0]
    machine = LinearSVC(C=cost, **SETTING).fit(x, np.where(y == 1, 1, -1))
    return 100 * interpolated(truth == 1, machine.decision_function(queries))


@pytest.mark.parametrize("difficult", ["ignored", "negative"])
def test_each_class_s_ap_is_a_direct_computation_s(splits, difficult):
    found = classify_all("abc", *splits, [0.5], 0, 2, difficult == "negative")
    expected = [direct(*splits, 0.5, column, difficult) for column in range(3)]
    assert [found[name].ap for name in "abc"] == pytest.approx(expected, abs=1e-9)
    assert {result.cost for result in found.values()} == {0.5}
    assert direct(*splits, 0.5, 0) != direct(*splits, 0.5, 0, "negative")


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_the_cost_is_the_best_of_three_folds(splits):
    x, y = splits[0][0], np.where(splits[0][1][:, 0] == 1, 1, -1)
    costs, means = (0.001, 0.5, 50), []
    for cost in costs:
        scores = []
        for train, held in StratifiedKFold(3).split(x, y):
            machine = LinearSVC(C=cost, **SETTING).fit(x[train], y[train])
            scores.append(average_precision_score(y[held], machine.decision_function(x[held])))
        means.append(np.mean(scores))
    assert len(set(means)) == 3
    assert choose_cost(x, y, costs, 0) == costs[int(np.argmax(means))]
    (features, labels), (queries, truth) = splits
    pairs = (features, labels[:, 0]), (queries, truth[:, 0])
    found = classify(*pairs, costs, 0)
    assert found.ap == pytest.approx(direct(*splits, found.cost, 0), abs=1e-9)


def test_processes_share_the_classes(splits, monkeypatch):
    """Each has every second class; all get all."""
    alone, shares = classify_all("abc", *splits, [0.5], 0, 1), {}
    monkeypatch.setattr(svm, "world_size", lambda: 2)
    for number in (0, 1, 0):
        monkeypatch.setattr(svm, "rank", lambda number=number: number)

        def exchange(found, number=number):
            shares[number] = found
            return list(shares.values())

        monkeypatch.setattr(svm, "all_objects", exchange)
        if number == 0 and 1 not in shares:
            with pytest.raises(KeyError):  # the other's is not there yet
                classify_all("abc", *splits, [0.5], 0, 1)
        else:
            assert classify_all("abc", *splits, [0.5], 0, 1) == alone
    assert [sorted(shares[number]) for number in (0, 1)] == [[0, 2], [1]]


def test_classes_that_cannot_be_measured_are_left_out_with_a_line(splits, capsys):
    (x, y), (queries, truth) = ((a, b.copy()) for a, b in splits)
    y[:, 1], truth[:, 2] = -1, -1
    found = classify_all("abc", (x, y), (queries, truth), [0.5], 0, 1)
    assert list(found) == ["a"]
    assert "left out, as train has fewer than 1 positive" in (out := capsys.readouterr().out)
    assert out.strip().endswith("test none: b, c")
    with pytest.raises(UserError, match="no class has positive"):
        classify_all("bc", (x, y[:, 1:]), (queries, truth[:, 1:]), [0.5], 0, 1)


def test_a_solver_that_ends_early_is_known(splits, monkeypatch):
    monkeypatch.setattr(svm, "MAX_ITERATIONS", 1)
    found = classify_all("abc", *splits, [1000.0], 0, 1)
    assert not any(result.converged for result in found.values())
