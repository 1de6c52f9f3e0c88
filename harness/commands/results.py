"""``harness results|export``: what a run has left, as it is."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.commands.shared import show, tell

app = typer.Typer()


class Format(StrEnum):
    table = "table"
    markdown = "markdown"
    csv = "csv"
    json = "json"


@app.command(epilog="Example: harness results runs/first --format markdown")
def results(
    run: Annotated[Path, typer.Argument(help="A run folder, also of a run that is still going.")],
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.table,
    cells: Annotated[bool, typer.Option("--cells", help="How each cell ended, instead of its measurements.")] = False,
    to: Annotated[Path | None, typer.Option(help="Write to this file instead.")] = None,
) -> None:
    """Print what a run has measured."""
    from harness import atomic, flags, results

    gc.disable()  # a short life and many rows: collecting garbage would take a third of the time
    found = results.load(run)
    if to is None:
        _print_results(found, run, format, cells)
    else:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            _print_results(found, run, format, cells)
        atomic.write_text(to, text.getvalue())
    tell("warning", flags.no_better_than_guessing(found, run))
    if count := results.unfinished(found):
        print(f"{count} of {len(found)} cells have not ended", file=sys.stderr)


def _print_results(found: Any, run: Path, format: Format, cells: bool) -> None:
    from harness import results, tables

    if format in (Format.json, Format.csv):
        rows = results.cell_rows(found, run) if cells else results.measurement_rows(found)
        if format is Format.json:
            results.write_json(rows, sys.stdout)
        else:
            results.write_csv(rows, results.CELL_KEYS if cells else results.MEASUREMENT_KEYS, sys.stdout)
    else:
        show(tables.cell_grids(found) if cells else tables.score_grids(found), markdown=format is Format.markdown)


@app.command("export", epilog="Example: harness export runs/first/cells/0123456789abcdef --format gptq --to exported")
def export_cell(
    cell: Annotated[Path, typer.Argument(help="A finished cell's folder, or its artifact.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[str, typer.Option(help="native, gptq or compressed-tensors")] = "native",
) -> None:
    """Write a finished cell as a checkpoint that other programs load."""
    from harness.export import export

    print(export(cell, format, to))
