"""``harness methods new|check``: for authors of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands.shared import FAILED, SIGNALLED

app = typer.Typer(name="methods", help="Write and check methods.", no_args_is_help=True)


@app.command("new", epilog="Example: harness methods new my_method")
def new_method(
    name: Annotated[str, typer.Argument(help="Of the method: letters, digits and underscores.")],
    here: Annotated[bool, typer.Option("--here", help="Only the method's file, in this folder.")] = False,
) -> None:
    """Write an installable package with one method that works at once."""
    from harness.scaffold import write_method

    for path in write_method(name, Path.cwd(), only_file=here):
        print(path)


@app.command("check", epilog="Example: harness methods check ./my_method.py")
def check_method(
    method: Annotated[str, typer.Argument(help="A name or a file, with options: gptq:damp=0.05")],
    full: Annotated[bool, typer.Option("--full", help="Also on smollm2-135m, a real model (minutes).")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 3600,
    memory: Annotated[str, typer.Option(help="Memory that it may hold.")] = "12GB",
) -> None:
    """Run the conformance suite: what every method has to keep to, each check with how to pass it."""
    from harness.conformance.report import examine

    failed, interrupted_by = examine(method, full=full, timeout_seconds=timeout, memory=memory)
    if interrupted_by is not None:
        raise typer.Exit(SIGNALLED + interrupted_by)
    if failed:
        raise typer.Exit(FAILED)
