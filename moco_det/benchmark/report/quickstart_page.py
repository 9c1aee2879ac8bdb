"""The quickstart's outcome for people (report.html) and for programs (report.json).

`results`, the dict that both are written from; AP and top-1 in percent, times in seconds:

    title, created            str
    seconds                   float, of the whole run
    data                      {label: text}, what was trained and tested on
    pretraining               {loss: [[epoch, loss]], chance_loss, knn: [[epoch, top-1]]}; epoch 0
                              of `knn` is the random encoder; empty where there are no val labels
    detection                 [{seed, random: {AP, AP50, AP75}, moco: {AP, AP50, AP75}}]
    detection_loss            {random: [[[iteration, loss]] per seed], moco: the same}
    steps                     [{name, command, seconds}]
    environment               {label: text}
    settings                  {file name: its text}
"""

import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_det.benchmark.report.charts import Line, dumbbell_chart, line_chart
from moco_det.benchmark.report.gallery import SCORE_SHOWN
from moco_det.benchmark.report.page import definitions, details, document, duration, plot
from moco_det.benchmark.significance import signed

NOT_MEASURED = {"random": None, "moco": None}
METRICS = {
    "AP50": "AP50: a box counts when it overlaps the true one by half",
    "AP": "AP: mean over overlaps from 0.50 to 0.95",
    "AP75": "AP75: overlap of three quarters",
}


@dataclass(frozen=True)
class Pair:
    """One test image with the detections of both detectors: two `<svg>` and what they show."""

    name: str
    moco: str
    moco_words: str
    random: str
    random_words: str


# -- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Paired values of one metric, one pair per seed. `spread`: sample s.d. of the differences."""

    random: float
    moco: float
    differences: tuple[float, ...]
    spread: float | None

    @property
    def difference(self) -> float:
        return self.moco - self.random


def compare(detection: Sequence[dict], metric: str) -> Comparison:
    """Means over seeds, and the difference that each seed shows by itself."""
    differences = tuple(run["moco"][metric] - run["random"][metric] for run in detection)
    return Comparison(
        statistics.fmean(run["random"][metric] for run in detection),
        statistics.fmean(run["moco"][metric] for run in detection),
        differences,
        statistics.stdev(differences) if len(differences) > 1 else None,
    )


def knn_top1(results: dict) -> dict[str, float | None]:
    """{random, moco}: the monitor's first and last values; None where it was not measured."""
    curve = results["pretraining"]["knn"]
    return {"random": curve[0][1], "moco": curve[-1][1]} if curve else NOT_MEASURED


def summary(results: dict) -> dict:
    """What report.json holds: the results, less the texts of the settings, plus the means."""
    ap50 = compare(results["detection"], "AP50")
    headline = {
        "seconds": results["seconds"],
        "knn_top1": knn_top1(results),
        "ap50": {"random": ap50.random, "moco": ap50.moco},
        "ap50_difference": {"mean": ap50.difference, "standard_deviation": ap50.spread},
    }
    return headline | {k: v for k, v in results.items() if k not in ("settings", *headline)}


# -- the numbers in words -------------------------------------------------------------------------


def reading(results: dict) -> list[str]:
    """What the numbers say and what they do not, in sentences (plain text)."""
    return [*_knn_in_words(results), *_detection_in_words(compare(results["detection"], "AP50"))]


def _knn_in_words(results: dict) -> list[str]:
    top1 = knn_top1(results)
    if top1["random"] is None:
        return ["The kNN monitor did not run: the images have no val/ folder with class folders."]
    gain = top1["moco"] - top1["random"]
    result = "learned what tells these classes apart" if gain > 0 else "did not improve on chance"
    return [
        f"Pretraining saw no label, and {result}: a nearest-neighbour classifier on the frozen "
        f"features names {top1['moco']:.1f} % of the held-out images correctly, against "
        f"{top1['random']:.1f} % on the features of the same network before training "
        f"({signed(gain)} points)."
    ]


def _detection_in_words(ap50: Comparison) -> list[str]:
    seeds = len(ap50.differences)
    ahead = sum(d > 0 for d in ap50.differences)
    side = "higher" if ap50.difference > 0 else "lower"
    first = (
        f"Two detectors were then trained the same way, differing in their first weights only. The "
        f"one that started from MoCo reaches an AP50 of {ap50.moco:.1f}, the one that started from "
        f"random weights {ap50.random:.1f}: {abs(ap50.difference):.1f} points {side}"
        + (f", as means of {seeds} seeds." if seeds > 1 else ".")
    )
    if seeds == 1:
        caution = "This is one seed: a single pair cannot tell an effect from luck."
    elif ahead == seeds:
        caution = (
            f"MoCo is ahead in each of the {seeds} seeds; the difference varies between them by "
            f"{ap50.spread:.1f} points (standard deviation)."
        )
    elif ahead == 0:
        caution = f"MoCo is ahead in none of the {seeds} seeds: here it did not help."
    else:
        caution = (
            f"MoCo is ahead in {ahead} of {seeds} seeds: the sign is not settled, and more seeds "
            "are needed before anything follows from it."
        )
    limits = (
        "The schedule is short on purpose: these numbers say nothing about long training, in which "
        "a detector from random weights usually catches up in part."
    )
    return [first, caution, limits]


# -- the page -------------------------------------------------------------------------------------


def write_report(results: dict, pairs: Sequence[Pair], folder: Path) -> Path:
    """Write report.json and report.html into `folder`; returns the path of the page."""
    text = json.dumps(summary(results), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render(results, pairs), encoding="utf-8")
    return page


def render(results: dict, pairs: Sequence[Pair]) -> str:
    """The page as one string: style, charts and images inside, no script, nothing fetched."""
    sections = [
        _header(results),
        _pretraining(results),
        _detection(results),
        _gallery(pairs) if pairs else "",
        _what_ran(results),
    ]
    return document(results["title"], sections)


def _header(results: dict) -> str:
    top1, ap50 = knn_top1(results), compare(results["detection"], "AP50")
    cards = [_card("Detection, AP50", signed(ap50.difference), ap50.random, ap50.moco)]
    if top1["random"] is not None:
        gain = top1["moco"] - top1["random"]
        cards.insert(0, _card("Features, kNN top-1", signed(gain), top1["random"], top1["moco"]))
    where = html.escape(results["environment"]["processor"])
    cards.append(
        f'<div class="card"><h3>Time</h3><p class="big">{duration(results["seconds"])}</p>'
        f"<p>{where}</p></div>"
    )
    words = "".join(f"<p>{html.escape(text)}</p>" for text in reading(results))
    return (
        f"<header><h1>{html.escape(results['title'])}</h1>"
        '<p class="lead">An encoder is pretrained with MoCo on images without labels; two equal '
        'object detectors are then trained, one from <span class="moco-ink">MoCo</span> and one '
        f'from <span class="random-ink">random weights</span>.</p><p class="note-line">Run of '
        f"{html.escape(results['created'])}</p></header>\n"
        f'<div class="cards">{"".join(cards)}</div>\n'
        f'<section aria-labelledby="reading"><h2 id="reading">What the numbers say</h2>{words}'
        "</section>"
    )


def _card(name: str, big: str, random: float, moco: float) -> str:
    return (
        f'<div class="card"><h3>{name}</h3><p class="big">{big} points</p>'
        f'<p>from <span class="random-ink">{random:.1f} %</span> at random to '
        f'<span class="moco-ink">{moco:.1f} %</span> with MoCo</p></div>'
    )


def _pretraining(results: dict) -> str:
    plots = [_loss_plot(results["pretraining"])]
    if results["pretraining"]["knn"]:
        plots.append(_knn_plot(results["pretraining"]["knn"]))
    return (
        '<section aria-labelledby="pretraining"><h2 id="pretraining">Pretraining</h2>'
        "<p>MoCo learns by telling two views of one image apart from the views of others kept in a "
        "queue. Labels only grade the features, in the kNN monitor; they never train them.</p>"
        f'<div class="plots">{"".join(plots)}</div></section>'
    )


def _loss_plot(pretraining: dict) -> str:
    points, chance = pretraining["loss"], pretraining["chance_loss"]
    means = _epoch_means(points)
    chart = line_chart(
        "Pretraining loss",
        f"From {points[0][1]:.2f} to {means[-1][1]:.2f}; guessing gives {chance:.2f}.",
        [Line(points, "faint"), Line(means, "moco")],
        "epoch",
        "contrastive loss",
        reference=(chance, "guessing among all keys"),
    )
    caption = (
        "Thin: as logged; bold: mean of each epoch. The loss may rise at the start, while the "
        "queue fills with keys worth telling apart."
    )
    return plot("Contrastive loss", chart, caption)


def _epoch_means(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Mean loss per epoch, placed at the middle of the epoch; an epoch holds x in (e-1, e]."""
    epochs: dict[int, list[float]] = {}
    for x, loss in points:
        epochs.setdefault(int(-(-x // 1)), []).append(loss)
    return [(epoch - 0.5, statistics.fmean(losses)) for epoch, losses in sorted(epochs.items())]


def _knn_plot(curve: Sequence[Sequence[float]]) -> str:
    first, last = curve[0][1], curve[-1][1]
    chart = line_chart(
        "kNN top-1 accuracy",
        f"From {first:.1f} % before training to {last:.1f} % after epoch {curve[-1][0]:g}.",
        [Line(curve, "moco", dots=True)],
        "epoch",
        "kNN top-1 (%)",
        reference=(first, f"random encoder: {first:.1f} %"),
        percent=True,
    )
    caption = "Share of held-out images whose class the nearest training images name correctly."
    return plot("What the features know", chart, caption)


def _detection(results: dict) -> str:
    runs, ap50 = results["detection"], compare(results["detection"], "AP50")
    rows = [(f"seed {r['seed']}", r["random"]["AP50"], r["moco"]["AP50"]) for r in runs]
    if len(runs) > 1:
        rows.append(("mean", ap50.random, ap50.moco))
    words = "; ".join(f"{name}: random {a:.1f}, MoCo {b:.1f}" for name, a, b in rows)
    caption = "One row per seed: the same run twice, from random weights and from MoCo."
    plots = [plot("AP50 on the test images", dumbbell_chart("AP50", words, rows), caption)]
    losses = results["detection_loss"]
    lines = [Line(run, style) for style in ("random", "moco") for run in losses[style] if run]
    if lines:
        chart = line_chart(
            "Detector training loss",
            "One line per seed and start.",
            lines,
            "iteration",
            "training loss",
        )
        caption = (
            'Solid: from <span class="moco-ink">MoCo</span>; dashed: from '
            '<span class="random-ink">random weights</span>; one line per seed.'
        )
        plots.append(plot("Loss while the detector trains", chart, caption))
    return (
        '<section aria-labelledby="detection"><h2 id="detection">Detection</h2>'
        "<p>Same architecture, data, order of images and schedule; only the starting weights of "
        f'the backbone differ.</p><div class="plots">{"".join(plots)}</div>'
        f"{_ap_table(runs)}</section>"
    )


def _ap_table(runs: Sequence[dict]) -> str:
    bodies = []
    for metric, meaning in METRICS.items():
        rows = [_ap_row(f"seed {r['seed']}", r["random"][metric], r["moco"][metric]) for r in runs]
        if len(runs) > 1:
            overall = compare(runs, metric)
            rows.append(_ap_row("mean", overall.random, overall.moco, "mean"))
        group = f'<tr><th class="group" scope="rowgroup" colspan="4">{meaning}</th></tr>'
        bodies.append(f"<tbody>{group}{''.join(rows)}</tbody>")
    head = "".join(f'<th scope="col">{n}</th>' for n in ("", "Random", "MoCo", "Difference"))
    return (
        "<table><caption>Average precision on the test images, percent.</caption>"
        f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"
    )


def _ap_row(name: str, random: float, moco: float, style: str = "") -> str:
    cells = f"<td>{random:.1f}</td><td>{moco:.1f}</td><td>{signed(moco - random)}</td>"
    return f'<tr class="{style}"><th scope="row">{name}</th>{cells}</tr>'


def _gallery(pairs: Sequence[Pair]) -> str:
    figures = "".join(
        f'<figure class="pair"><div>{p.moco}<p><span class="moco-ink">MoCo</span>: '
        f"{html.escape(p.moco_words)}</p></div><div>{p.random}<p>"
        f'<span class="random-ink">Random</span>: {html.escape(p.random_words)}</p></div></figure>'
        for p in pairs
    )
    legend = (
        '<ul class="legend"><li><span class="truth"></span>true box</li>'
        '<li><span class="right"></span>right: class agrees, boxes overlap by half</li>'
        '<li><span class="wrong"></span>✕ wrong</li></ul>'
    )
    return (
        '<section aria-labelledby="pictures"><h2 id="pictures">Detections on test images</h2>'
        "<p>Images at even distances through the test list, not chosen by result; detections "
        f"with a score of {100 * SCORE_SHOWN:.0f} % or more, first seed.</p>{legend}"
        f'<div class="gallery">{figures}</div></section>'
    )


def _what_ran(results: dict) -> str:
    steps = "".join(
        f'<tr><th scope="row">{html.escape(s["name"])}</th><td>{duration(s["seconds"])}</td></tr>'
        for s in results["steps"]
    )
    commands = details("Commands", "\n\n".join(s["command"] for s in results["steps"]))
    settings = "".join(details(name, text) for name, text in results["settings"].items())
    return (
        '<section aria-labelledby="ran"><h2 id="ran">What was run</h2>'
        f"<h3>Data</h3>{definitions(results['data'])}<h3>Machine and versions</h3>"
        f"{definitions(results['environment'])}<table><caption>Steps</caption><thead><tr>"
        f'<th scope="col">Step</th><th scope="col">Time</th></tr></thead><tbody>{steps}</tbody>'
        f"</table>{commands}{settings}"
        "</section>"
    )
