"""What commands share: how lists are read, exit codes, where things are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

FAILED, WRONG_USE, SIGNALLED = 1, 2, 128

DataRoot = Annotated[
    str | None, typer.Option(envvar="HARNESS_DATA_ROOT", help="Folder of datasets laid out as on the hub.")
]


def listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def console() -> Any:
    """Standard output; wide where nobody sees it, so that a file or a pipe gets whole lines."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def show(grids: Any, *, markdown: bool) -> None:
    from harness import tables

    if markdown or tables.is_long(grids):
        print(tables.markdown(grids), end="")
    else:
        console().print(tables.rendered(grids))


def tell(kind: str, lines: Iterable[str]) -> None:
    """Notes and warnings, beside what is asked for."""
    for line in lines:
        print(f"{kind}: {line}", file=sys.stderr)
