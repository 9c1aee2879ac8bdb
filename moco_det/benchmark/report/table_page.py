"""report.html of a reproduction: tables as in the paper, curves, sample predictions, provenance."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from moco_det.benchmark.report.charts import Line, line_chart
from moco_det.benchmark.report.page import definitions, details, document, duration, plot, section
from moco_det.benchmark.report.samples import SCORE_SHOWN, Sample
from moco_det.benchmark.report.tables import (
    LEGEND,
    difference_text,
    mean_text,
    n_text,
    number_text,
    references,
)

STYLES = 8  # of lines, in report.css

Curves = Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]]
Pictures = Mapping[str, Sequence[Sequence[Sample]]]


def render(results: Mapping[str, Any], curves: Curves, pictures: Pictures) -> str:
    """The page as one string.

    Args:
        results: see `results.collect`, with title, created, checkpoints and environment.
        curves: experiment -> row -> a list of (iteration, loss) for each of its runs.
        pictures: experiment -> `samples.samples`.
    """
    rows = dict.fromkeys(run["row"] for run in results["runs"])
    styles = {row: f"s{index % STYLES}" for index, row in enumerate(rows)}
    labels = {row["row"]: row["label"] for t in results["tables"] for row in t["rows"]}
    return document(
        results["title"],
        [
            _header(results),
            *(_table_section(table) for table in results["tables"]),
            _curves(curves, labels, styles),
            _pictures(pictures, labels),
            _runs(results),
        ],
    )


def _header(results: Mapping[str, Any]) -> str:
    done = sum(run["state"] == "finished" for run in results["runs"])
    state = f"{done} of {len(results['runs'])} runs are finished"
    links = "".join(
        f'<li><a href="#table-{t["name"]}">{html.escape(t["title"])}</a></li>'
        for t in results["tables"]
    )
    return (
        f"<header><h1>{html.escape(results['title'])}</h1>"
        f'<p class="lead">{state} ({html.escape(results["created"])})</p></header>'
        f'<nav aria-label="Tables"><ul class="contents">{links}</ul></nav>'
        f'<p class="note-line">{html.escape(LEGEND)}</p>'
    )


# -- tables ---------------------------------------------------------------------------------------


def _table_section(table: Mapping[str, Any]) -> str:
    stamps = "".join(f'<p class="stamp">{html.escape(stamp)}</p>' for stamp in table["stamps"])
    return section(f"table-{table['name']}", table["title"], stamps + table_html(table))


def table_html(table: Mapping[str, Any]) -> str:
    """One table; it scrolls sideways where it is wider than the screen."""
    rows = "".join(_row(row, table) for row in table["rows"])
    notes = [f"paper: {table['source']}"] if table["source"] else []
    notes += [f"gap: to {' / '.join(references(table))}"] if references(table) else []
    above = f'<p class="note-line">{html.escape("; ".join(notes))}</p>' if notes else ""
    return (
        f'{above}<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{html.escape(table["title"])}"><table class="paper">'
        f"<thead>{_head(table)}</thead><tbody>{rows}</tbody></table></div>"
    )


def _head(table: Mapping[str, Any]) -> str:
    parts, lines = table["parts"], ""
    if any(part["heading"] for part in parts):
        cells = "".join(
            f'<th scope="colgroup" class="group" colspan="{len(part["columns"])}">'
            f"{html.escape(part['heading'])}</th>"
            for part in parts
        )
        lines = f"<tr><td></td>{cells}</tr>"
    columns = [column for part in parts for column in part["columns"]]
    names = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    return f'{lines}<tr><th scope="col">pre-train</th>{names}</tr>'


def _row(row: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    count = f'<span class="sub">{n_text(row)}</span>' if n_text(row) else ""
    cells = "".join(_cell(cell) for part in row["cells"] for cell in part)
    head = f'<th scope="row">{html.escape(row["label"])}{count}</th>'
    return f"<tr>{head}{cells}</tr>"


def _cell(cell: Mapping[str, Any]) -> str:
    """Ours; below it the paper's with our difference; below that the gap to the reference."""
    lines = []
    if cell["n"]:
        mean, _, deviation = mean_text(cell).partition(" ± ")
        sd = f'<span class="sd"> ± {deviation}</span>' if deviation else ""
        lines.append(f'<span class="ours">{mean}{sd}</span>')
    if cell["published"] is not None:
        lines.append(f'<span class="sub">paper {number_text(cell["published"])}</span>')
    for key, name in (("from_published", "to paper"), ("from_reference", "gap")):
        difference = cell[key]
        if difference:
            style = "sub marked" if difference["marked"] else "sub"
            lines.append(f'<span class="{style}">{name} {difference_text(difference)}</span>')
    return f"<td>{''.join(lines)}</td>"


# -- curves and pictures --------------------------------------------------------------------------


def _curves(curves: Curves, labels: Mapping[str, str], styles: Mapping[str, str]) -> str:
    plots = []
    for experiment, rows in curves.items():
        lines = [Line(run, styles[row]) for row, runs in rows.items() for run in runs if run]
        if lines:
            described = f"One line per run, of {', '.join(labels[row] for row in rows)}."
            chart = line_chart(experiment, described, lines, "iteration", "training loss")
            keys = "".join(
                f'<span class="key {styles[row]}">{html.escape(labels[row])}</span>'
                for row, runs in rows.items()
                if any(runs)
            )
            plots.append(plot(html.escape(experiment), chart, keys))
    if not plots:
        return ""
    words = "<p>Total loss while the detectors train, one line per run.</p>"
    return section("curves", "Training", f'{words}<div class="plots">{"".join(plots)}</div>')


def _pictures(pictures: Pictures, labels: Mapping[str, str]) -> str:
    parts = []
    for experiment, images in pictures.items():
        figures = "".join(_picture_row(samples, labels) for samples in images)
        if figures:
            parts.append(f"<h3>{html.escape(experiment)}</h3>{figures}")
    if not parts:
        return ""
    words = (
        "<p>Images at even distances through the test list, not chosen by result; the first trial "
        f"of each row, detections with a score of {100 * SCORE_SHOWN:.0f} % or more.</p>"
    )
    return section("pictures", "Sample predictions", words + "".join(parts))


def _picture_row(samples: Sequence[Sample], labels: Mapping[str, str]) -> str:
    figures = []
    for sample in samples:
        name = html.escape(labels[sample.row] if sample.row else "truth")
        described = f"Image {html.escape(sample.image_id)}, {name}"
        figures.append(
            f'<figure><img src="{sample.uri}" alt="{described}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return f'<div class="samples">{"".join(figures)}</div>'


# -- what ran -------------------------------------------------------------------------------------


def _runs(results: Mapping[str, Any]) -> str:
    lines, commands = [], []
    for run in results["runs"]:
        record = run["record"]
        took = duration(record["seconds"]) if record.get("attempts") else ""
        cells = (run["name"], run["state"], record.get("engine", ""), took)
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        if record:
            commands.append(record["command"])
    head = "".join(f'<th scope="col">{name}</th>' for name in ("run", "state", "engine", "time"))
    checkpoints = ""
    if results["checkpoints"]:
        checkpoints = f"<h3>Checkpoints</h3>{definitions(results['checkpoints'])}"
    text = "\n\n".join(commands)
    body = (
        f"{checkpoints}<h3>Code, packages, machines</h3>{_provenance(results)}"
        f'<div class="scroll" tabindex="0"><table class="runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{details('Commands', text)}"
    )
    return section("ran", "What was run", body)


def _provenance(results: Mapping[str, Any]) -> str:
    """What the runs say of themselves, each different text once."""
    entries: dict[str, dict[str, None]] = {}
    for record in [run["record"] for run in results["runs"] if run["record"]]:
        for group in ("code", "hardware", "packages"):
            for name, text in record[group].items():
                entries.setdefault(name, {})[str(text)] = None
    return definitions({name: "; ".join(texts) for name, texts in entries.items()})
