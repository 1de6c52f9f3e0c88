"""``harness report|leaderboard|compare``: what is derived from runs."""

from __future__ import annotations

import gc
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from harness.commands.shared import FAILED, console, listed, show, tell

app = typer.Typer()


class ReportFormat(StrEnum):
    table = "table"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    html = "html"


Runs = Annotated[list[Path] | None, typer.Argument(help="Run folders, also of several machines.")]


@app.command(epilog="Example: harness report runs/first runs/second --out report")
def report(
    runs: Runs = None,
    format: Annotated[ReportFormat, typer.Option(help="How to print the tables.")] = ReportFormat.table,
    ledger: Annotated[bool, typer.Option("--ledger", help="Published numbers beside these, instead.")] = False,
    to: Annotated[Path | None, typer.Option(help="Write what would be printed to this file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the tables in every format, and all plots, here.")] = None,
) -> None:
    """Print tables as papers have them: intervals, best and second best by the statistics; or write a report."""
    from harness.reports import report as reports

    gc.disable()
    found = reports.Report.of(runs or [], ledger=ledger)
    tell("note", found.gathered.notes)
    if out is not None:
        for path in found.write(out):
            print(path)
    elif to is not None:
        found.print_to(to, format.value, ledger=ledger)
    else:
        found.print(console(), format.value, ledger=ledger)


@app.command(epilog="Example: harness leaderboard runs/first runs/second --out site")
def leaderboard(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder of the site; an earlier leaderboard there is replaced.")],
) -> None:
    """Write a static site of all that runs have measured; it opens from the disk, without a network."""
    from harness.reports.gathered import gather
    from harness.reports.site import write_site

    gc.disable()
    gathered = gather(runs or [])
    tell("note", gathered.notes)
    write_site(gathered, out)
    print(out / "index.html")


@app.command(epilog="Example: harness compare runs/main runs/candidate --margins acc=0.02 --junit gate.xml")
def compare(
    baseline: Annotated[Path, typer.Argument(help="The run folder to measure against.")],
    candidate: Annotated[Path, typer.Argument(help="The run folder that must not be worse.")],
    margins: Annotated[
        str, typer.Option(help="What counts as no difference: token_perplexity=0.01,acc=0.02,quantize_seconds=0.1")
    ] = "",
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML to this file.")] = None,
) -> None:
    """Fail if a run is worse than another, cell by cell, on the same samples."""
    from harness import atomic, tables
    from harness.reports import compare as gates
    from harness.reports.junit import junit as as_junit

    gate = gates.compare_runs(baseline, candidate, gates.read_margins(listed(margins) or ()))
    grids = gates.grids(gate)
    if markdown:
        atomic.write_text(markdown, f"{gate.summary()}\n\n{tables.markdown(grids)}")
    if junit:
        atomic.write_text(junit, as_junit(gate))
    tell("warning", gate.warnings)
    show(grids, markdown=False)
    print(gate.summary())
    if gate.failed:
        raise typer.Exit(FAILED)
