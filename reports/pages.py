"""The templates of pages, with names shown as text: Jinja escapes everything, and nothing invisible passes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.reports.words import visible

_HERE = Path(__file__).parent
ASSETS = _HERE / "assets"


@cache
def environment() -> Environment:
    """Templates of this package only; every value is escaped."""
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["visible"] = visible
    return made


def render(template: str, values: Mapping[str, Any]) -> str:
    return environment().get_template(template).render(values)
