"""Line and dumbbell charts as inline SVG: no script, colours from the page's style sheet.

Every chart is one `<svg role="img">` whose title and description say in words what it shows. The
colours are classes that report.css sets for light, dark and paper: `moco`, `random`, `faint`, and
`s0` to `s7` for lines of any number of rows.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 280  # of a line chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 16, 46  # margins around the plotting area

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A polyline through (x, y) with x >= 0; `style` is its CSS class, `dots` marks its points."""

    points: Points
    style: str
    dots: bool = False


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
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
    percent: bool = False,
) -> str:
    """Draw lines over common axes, x from 0.

    `reference` is a dashed level with its name written on it; `percent` keeps 0 in the picture, so
    that a small gain does not look like a large one.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([reference[0]] if reference else [])
    y_ticks = nice_ticks(0.0 if percent else min(ys), max(ys))
    x_ticks = [t for t in nice_ticks(0.0, max(xs), 6) if t <= max(xs)]
    x_of = _scale(0.0, max(xs), LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_ticks, y_ticks, x_of, y_of), _axis_names(x_label, y_label)]
    if reference:
        parts.append(_level(y_of(reference[0]), reference[1]))
    for line in lines:
        spots = [(x_of(x), y_of(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if line.dots:
            parts += [
                f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                f"<title>{tick_text(round(at, 2))}: {value:.1f}</title></circle>"
                for (x, y), (at, value) in zip(spots, line.points, strict=True)
            ]
    return _svg(title, description, WIDTH, HEIGHT, "".join(parts))


def dumbbell_chart(title: str, description: str, rows: Sequence[tuple[str, float, float]]) -> str:
    """One row per (name, random, moco): two dots on a common percent scale, joined by a bar."""
    left, pitch = 74, max(44, (HEIGHT - 52) / len(rows))  # few rows: as tall as a line chart
    height = round(pitch * len(rows)) + 52
    ticks = nice_ticks(0.0, max(max(a, b) for _, a, b in rows))
    x_of = _scale(ticks[0], ticks[-1], left, WIDTH - 24)
    parts = []
    for tick in ticks:
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 40}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{height - 22}">{tick_text(tick)}')
        parts.append("</text>")
    for index, (name, random, moco) in enumerate(rows):
        y = 16 + pitch * (index + 0.5)
        a, b = x_of(random), x_of(moco)
        style = "row strong" if name == "mean" else "row"
        parts += [
            f'<text class="{style} end" x="{left - 14}" y="{y + 5:.1f}">{html.escape(name)}</text>',
            f'<line class="joint" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
            _dumbbell_end("random", a, y, random, before=random <= moco),
            _dumbbell_end("moco", b, y, moco, before=random > moco),
        ]
    parts.append(f'<text class="name middle" x="{WIDTH / 2}" y="{height - 3}">AP50 (%)</text>')
    return _svg(title, description, WIDTH, height, "".join(parts))


def _dumbbell_end(style: str, x: float, y: float, value: float, before: bool) -> str:
    """A dot with its value written on the outer side, so that two close dots stay readable."""
    anchor, shift = ("end", -11) if before else ("start", 11)
    shape = f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>'
    text = f'<text class="value {style} {anchor}" x="{x + shift:.1f}" y="{y + 5:.1f}">'
    return f"{shape}{text}{value:.1f}</text>"


def _scale(low: float, high: float, start: float, end: float):
    """The linear map that takes [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axes(x_ticks, y_ticks, x_of, y_of) -> str:
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        text = f'<text class="tick end" x="{LEFT - 7}" y="{y + 4.5:.1f}">{tick_text(tick)}</text>'
        parts += [line, text]
    for tick in x_ticks:
        at = f'x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text class="tick middle" {at}>{tick_text(tick)}</text>')
    return "".join(parts)


def _axis_names(x_label: str, y_label: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    across = (
        f'<text class="name middle" x="{middle}" y="{HEIGHT - 6}">{html.escape(x_label)}</text>'
    )
    y = (TOP + HEIGHT - BOTTOM) / 2
    turn = f'transform="translate(13 {y}) rotate(-90)"'
    return across + f'<text class="name middle" {turn}>{html.escape(y_label)}</text>'


def _level(y: float, name: str) -> str:
    line = f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    below = y < TOP + 16  # no room above the line
    at = f'x="{WIDTH - RIGHT - 4}" y="{y + (15 if below else -6):.1f}"'
    return line + f'<text class="note end" {at}>{html.escape(name)}</text>'


def _svg(title: str, description: str, width: int, height: int, body: str) -> str:
    label = html.escape(f"{title}. {description}", quote=True)
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-label="{label}">'
        f"<desc>{html.escape(description)}</desc>{body}</svg>"
    )
