"""``harness methods new|check``: for authors of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands.shared import FAILED, SIGNALLED

app = typer.Typer(name="methods", help="Write and check methods.", no_args_is_help=True)


@app.command(epilog="Example: harness methods new my_method")
def new(
    name: Annotated[str, typer.Argument(help="Of the method: letters, digits and underscores.")],
    here: Annotated[bool, typer.Option("--here", help="Only the method's file, in this folder.")] = False,
) -> None:
    """Write an installable package with one method that works at once."""
    from harness.scaffold import write_method

    for path in write_method(name, Path.cwd(), only_file=here):
        print(path)


@app.command(epilog="Example: harness methods check ./my_method.py")
def check(
    methods: Annotated[list[str], typer.Argument(help="Names or files, with options: gptq:damp=0.05")],
    full: Annotated[bool, typer.Option("--full", help="Also on smollm2-135m, a real model (minutes).")] = False,
    jobs: Annotated[int | None, typer.Option(help="Methods at a time. Default: one for each processor.", min=1)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that each method may take.")] = 3600,
    memory: Annotated[str, typer.Option(help="Memory that each may hold.")] = "12GB",
) -> None:
    """Run the conformance suite: what every method has to keep to, each check with how to pass it."""
    from harness.conformance.report import examine
    from harness.limits import Limits, parse_bytes, processors
    from harness.pool import Interrupted

    limits = Limits(jobs=jobs or processors(), timeout_seconds=timeout, memory_bytes=parse_bytes(memory))
    try:
        passed = examine(methods, full=full, limits=limits)
    except Interrupted as stop:
        raise typer.Exit(SIGNALLED + stop.signal) from None
    if not passed:
        raise typer.Exit(FAILED)
