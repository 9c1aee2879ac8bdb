"""Linear SVMs on frozen features, one for each of VOC's classes.

Goyal et al. 2019 (arXiv:1905.01235) choose each class's cost by cross-validation, as VISSL does;
"Revisiting Contrastive Methods" (arXiv:2106.05967) takes C = 0.5 for all. Both weight positives
twice, and report the area under the interpolated precision-recall curve, VOC's AP since 2010, and
not the 11-point AP of VOC 2007.

Shape legend:
    M: images     D: pooled features     C: classes
"""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from moco_det.common.errors import UserError, import_optional
from moco_det.common.processes import all_objects, print_on_main, rank, world_size
from pretrain.data.voc_labels import DIFFICULT, PRESENT

COST = 0.5  # of the paper's public code
COSTS = (0.01, 0.1, 1.0, 2, 5, 10, 15, 20, 50, 100, 1000)  # VISSL's, to choose among
FOLDS = 3  # VISSL's
POSITIVES_WEIGHT = 2
MAX_ITERATIONS = 2000
NEEDS = "VOC's classification by SVM", "scikit-learn"


@dataclass(frozen=True)
class ClassResult:
    """What became of one class: its AP in percent, the cost, whether the solver converged."""

    ap: float
    cost: float
    converged: bool


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """The area under the interpolated precision-recall curve, in [0, 1].

    At a recall the precision counts that is the largest at this recall or a higher one. Images of
    equal scores come in together, so that their order does not matter.

    Args:
        positive: bool M; one at least is True.
        scores: M.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of equal scores
    precision = hits[last] / (last + 1)
    recall = hits[last] / hits[-1]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def build_svm(cost: float, seed: int):
    """The classifier of the public code; `seed`: of the order in which liblinear visits samples.

    Raises UserError where scikit-learn is absent.
    """
    svm = import_optional("sklearn.svm", *NEEDS)
    return svm.LinearSVC(
        C=cost,
        class_weight={1: POSITIVES_WEIGHT, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=MAX_ITERATIONS,
        random_state=seed,
    )


def choose_cost(
    features: np.ndarray, signs: np.ndarray, costs: Sequence[float], seed: int
) -> float:
    """The first of the costs with the highest mean AP of `FOLDS` folds, as VISSL has it.

    The folds are scikit-learn's stratified ones, in the order of the images, and their AP is its
    average_precision, which does not interpolate.

    Args:
        features: M x D.
        signs: 1 or -1, M.
    """
    selection = import_optional("sklearn.model_selection", *NEEDS)
    means = [
        selection.cross_val_score(
            build_svm(cost, seed), features, signs, cv=FOLDS, scoring="average_precision"
        ).mean()
        for cost in costs
    ]
    return costs[int(np.argmax(means))]


def classify(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    costs: Sequence[float],
    seed: int,
    difficult_counts: bool = False,
) -> ClassResult:
    """Train the SVM of one class and measure its AP.

    Args:
        train, test: features M x D, L2-normalised, and the class's labels M as in VOC's lists.
        costs: one, or several to choose among by cross-validation.
        difficult_counts: images whose only objects of the class are difficult count as negatives,
            as in the paper's public code; else they are left out.
    """
    (features, labels), (queries, truth) = train, test
    if not difficult_counts:
        features, labels = features[labels != DIFFICULT], labels[labels != DIFFICULT]
        queries, truth = queries[truth != DIFFICULT], truth[truth != DIFFICULT]
    signs = np.where(labels == PRESENT, 1, -1)
    cost = costs[0] if len(costs) == 1 else choose_cost(features, signs, costs, seed)
    svm = build_svm(cost, seed).fit(features, signs)
    ap = average_precision(truth == PRESENT, svm.decision_function(queries))
    return ClassResult(100 * ap, cost, int(np.max(svm.n_iter_)) < MAX_ITERATIONS)


def classify_all(
    classes: Sequence[str],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    costs: Sequence[float],
    seed: int,
    threads: int,
    difficult_counts: bool = False,
) -> dict[str, ClassResult]:
    """`classify` for each class: they are dealt to the processes, and there to threads. Collective.

    A class that has no image to learn from, or none to be found, is left out, with a line.

    Args:
        train, test: features M x D and labels M x C.

    Raises:
        UserError: no class is left; scikit-learn is absent.
    """
    import_optional("sklearn.svm", *NEEDS)
    least = FOLDS if len(costs) > 1 else 1
    usable = [c for c in range(len(classes)) if _usable(train[1][:, c], test[1][:, c], least)]
    left_out = [name for c, name in enumerate(classes) if c not in usable]
    if left_out:
        print_on_main(
            f"left out, as train has fewer than {least} positive or negative image(s) of the class,"
            f" or test none: {', '.join(left_out)}"
        )
    if not usable:
        raise UserError("no class has positive and negative images in train and positives in test")
    work = partial(
        _classify_column, train=train, test=test, costs=costs, seed=seed, counts=difficult_counts
    )
    mine = usable[rank() :: world_size()]
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, threads)) as pool:
        warnings.simplefilter("ignore")  # of a solver that does not converge: told once, below
        found = dict(zip(mine, pool.map(work, mine), strict=True))
    merged = {c: result for share in all_objects(found) for c, result in share.items()}
    return {classes[c]: merged[c] for c in usable}


def _usable(train: np.ndarray, test: np.ndarray, least: int) -> bool:
    positives = int((train == PRESENT).sum())
    negatives = int((train != PRESENT).sum() - (train == DIFFICULT).sum())
    return min(positives, negatives) >= least and bool((test == PRESENT).any())


def _classify_column(column: int, train, test, costs, seed: int, counts: bool) -> ClassResult:
    (features, labels), (queries, truth) = train, test
    pairs = (features, labels[:, column]), (queries, truth[:, column])
    return classify(*pairs, costs, seed, counts)
