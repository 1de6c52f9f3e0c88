"""``harness bench``: what packed codes cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands.shared import FAILED, console, listed

app = typer.Typer()


@app.command(epilog="Example: harness bench --models llama2-7b --settings W4A16g128,W4A8 --tokens 1,16,128")
def bench(
    models: Annotated[
        str, typer.Option(help="Whose layer shapes: presets, or checkpoints on this machine.")
    ] = "llama2-7b",
    settings: Annotated[str, typer.Option(help="Kernel paths, as settings.")] = "W4A16g128,W4A8",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, 1 to 4096.")] = "1,4,16,128",
    out: Annotated[Path, typer.Option(help="Run folder for the samples: report and compare find them there.")] = Path(
        "runs/bench"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda; left out: cuda where there is one.")] = "",
    static: Annotated[bool, typer.Option("--static", help="Compile for every GPU and look; time nothing.")] = False,
    targets: Annotated[str, typer.Option(help="With --static: sm_80,…,gfx942.")] = "",
    tighten: Annotated[bool, typer.Option("--tighten", help="With --static: record loops that got shorter.")] = False,
) -> None:
    """Time the kernels that run here, or look at compiled ones for GPUs that are not here."""
    from harness import benchmarking, provenance

    if static:
        faults = benchmarking.static(listed(targets) or (), out, console(), tighten=tighten)
        if faults:
            raise typer.Exit(FAILED)
    else:
        device = device or provenance.default_device()
        benchmarking.timed(
            listed(models) or (), listed(settings) or (), listed(tokens) or (), out, console(), device=device
        )
