"""The parts of a self-contained page: style and images inside, no script, nothing fetched."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path


def document(title: str, sections: Sequence[str]) -> str:
    """A page from its sections, which are HTML; `title` is plain text."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, body: str) -> str:
    """`name` is the section's id, `title` plain text, `body` HTML."""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(title)}</h2>{body}'
        "</section>"
    )


def plot(title: str, chart: str, caption: str) -> str:
    """A chart with its title and, unless it is "", a caption; all are HTML."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="plot"><h3>{title}</h3>{chart}{below}</figure>'


def definitions(entries: Mapping[str, object]) -> str:
    """Label and text, one below the other."""
    pairs = ((html.escape(str(k)), html.escape(str(v))) for k, v in entries.items())
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in pairs) + "</dl>"


def details(summary: str, text: str) -> str:
    """Plain text that is opened by a click on its summary."""
    head = f"<summary>{html.escape(summary)}</summary>"
    return f"<details>{head}<pre>{html.escape(text)}</pre></details>"


def duration(seconds: float) -> str:
    """For example "8 min 05 s", "42 s" or "3 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
