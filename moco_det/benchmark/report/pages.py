"""HTML from the templates beside this file: every text is escaped, nothing is fetched."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moco_det.benchmark.report import tables
from moco_det.benchmark.significance import signed


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
    return environment


def duration(seconds: float) -> str:
    """For example "8 min 05 s", "42 s" or "3 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
