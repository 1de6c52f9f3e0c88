"""``harness list|doctor`` and ``harness models fetch|data mirror``: what this machine has, and what it lacks."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from harness.commands.shared import FAILED, DataRoot, console, listed

app = typer.Typer()
models = typer.Typer(help="Models on this machine.", no_args_is_help=True)
data = typer.Typer(help="Data for tasks.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(data, name="data")


class Listing(StrEnum):
    methods = "methods"
    models = "models"
    tasks = "tasks"
    settings = "settings"
    kernels = "kernels"


@app.command("list", epilog="Example: harness list methods")
def list_(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List methods, models, tasks, settings or kernels."""
    from rich.table import Table
    from rich.text import Text

    from harness import listing

    table = Table("name", "what it is", "options", title=Text(what.value), title_justify="left")
    for row in listing.rows(what.value):
        table.add_row(*map(Text, row))
    console().print(table)


@app.command(epilog="Example: harness doctor --tasks zeroshot6,wikitext2 --data-root ../data")
def doctor(
    data_root: DataRoot = None,
    tasks: Annotated[str | None, typer.Option(help="Also load what these tasks read; tell what is missing.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Also ask whether the Hugging Face hub answers.")] = False,
) -> None:
    """Tell what this machine can run."""
    from rich.table import Table
    from rich.text import Text

    from harness import doctor

    colours = {"good": "green", "missing": "yellow", "bad": "red"}
    table = Table("what", "state", "detail")
    root = Path(data_root).resolve() if data_root else None
    findings = [*doctor.examine(root, hub=hub), *doctor.examine_tasks(listed(tasks) or (), root)]
    for finding in findings:
        table.add_row(Text(finding.what), Text(finding.state, style=colours[finding.state]), Text(finding.detail))
    console().print(table)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(FAILED)


@models.command("fetch", epilog="Example: harness models fetch smollm2-135m")
def fetch_model(name: Annotated[str, typer.Argument(help="A preset or a hub id.")]) -> None:
    """Bring a model to this machine."""
    from harness.fetch import fetch
    from harness.presets import resolve_model

    print(fetch(resolve_model(name), _say))


@data.command("mirror", epilog="Example: harness data mirror zeroshot6 mmlu wikitext2 --to ../data")
def mirror_data(
    tasks: Annotated[list[str], typer.Argument(help="Tasks or presets.")],
    to: Annotated[Path, typer.Option(help="The data root to fill.")],
    data_root: DataRoot = None,
) -> None:
    """Copy what tasks read from the hub (or another data root) into a folder for machines without a network."""
    from harness.tasks.catalogue import parse_task
    from harness.tasks.mirror import mirror
    from harness.tasks.presets import expand

    specs = [parse_task(text) for text in expand(tasks)]
    for folder in mirror(specs, to, Path(data_root).resolve() if data_root else None, _say):
        print(folder)


def _say(stage: str, done: int, total: int, detail: str = "") -> None:
    print(f"{stage} {done}/{total} {detail}", file=sys.stderr)
