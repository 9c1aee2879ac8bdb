"""HTML pages and SVG charts from the templates beside this file, without scripts.

Every text is escaped, nothing is fetched. A chart is one inline `<svg role="img">` whose title and
description say in words what it shows. Its colours are classes that report.css sets for light, dark
and paper: `moco`, `random`, `faint`, and `s0` to `s7` for lines of any number of rows. What is
drawn is in the templates *_chart.svg.j2; here is where it lies.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moco_det.benchmark.report import tables
from moco_det.benchmark.significance import signed

WIDTH, HEIGHT = 460, 280  # of a line chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 16, 46  # margins around the plotting area

Points = Sequence[tuple[float, float]]


def render(template: str, **values) -> Markup:
    """One of templates/ with these values: a page, or a piece of one that others may hold."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "pixels": "{:.1f}".format,
        "number": tables.number_text,
        "signed": signed,
        "difference": tables.difference_text,
        "count": tables.count_text,
        "duration": duration,
    }
    environment.globals |= {"line_chart": line_chart, "dumbbell_chart": dumbbell_chart}
    return environment


def duration(seconds: float) -> str:
    """For example "8 min 05 s", "42 s" or "3 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# -- charts ---------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high], about `count`.

    The first is at most `low`, the last at least `high`.
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """20.0 -> "20", 0.25 -> "0.25", 1500 -> "1,500"."""
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def line_chart(
    title: str,
    description: str,
    lines: Sequence[tuple[str, Points]],
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
    percent: bool = False,
    dots: bool = False,
) -> Markup:
    """Draw lines over common axes, x from 0.

    Args:
        lines: the CSS class of each, and its points.
        reference: a dashed level, and the name that is written on it.
        percent: keep 0 in the picture, so that a small gain does not look like a large one.
        dots: mark the points.
    """
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points] + ([reference[0]] if reference else [])
    y_ticks = nice_ticks(0.0 if percent else min(ys), max(ys))
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    return render(
        "line_chart.svg.j2",
        title=title, description=description, width=WIDTH, height=HEIGHT,
        left=left, right=right, top=top, bottom=bottom,
        x=_scale(0.0, max(xs), left, right),
        y=_scale(y_ticks[0], y_ticks[-1], bottom, top),
        x_ticks=[tick for tick in nice_ticks(0.0, max(xs), 6) if tick <= max(xs)],
        y_ticks=y_ticks, tick_text=tick_text, lines=lines, x_label=x_label, y_label=y_label,
        reference=reference, dots=dots,
    )  # fmt: skip


def dumbbell_chart(
    title: str, description: str, rows: Sequence[tuple[str, float, float]]
) -> Markup:
    """One row per (name, random, moco): two dots on a common percent scale, joined by a bar."""
    pitch = max(44, (HEIGHT - 52) / len(rows))  # few rows: as tall as a line chart
    ticks = nice_ticks(0.0, max(max(random, moco) for _, random, moco in rows))
    left, right = 74, WIDTH - 50  # room for the names, and for a value beside the last tick
    return render(
        "dumbbell_chart.svg.j2",
        title=title, description=description, width=WIDTH, height=round(pitch * len(rows)) + 52,
        left=left, x=_scale(ticks[0], ticks[-1], left, right), ticks=ticks,
        tick_text=tick_text, rows=rows, pitch=pitch,
    )  # fmt: skip


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map that takes [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)
