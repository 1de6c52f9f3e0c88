"""``harness run``: methods over models, settings and tasks."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.commands.shared import FAILED, SIGNALLED, DataRoot, console, listed, show, tell
from harness.errors import HarnessError

app = typer.Typer()


@app.command(epilog="Example: harness run --methods rtn --models smollm2-135m --settings W4A16g64,W4A8 --tasks pydoc")
def run(
    file: Annotated[
        Path | None, typer.Argument(help="A TOML file with these options as keys; flags win over it.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, or their files, with options: gptq:damp=0.05,./my.py")
    ] = None,
    models: Annotated[str | None, typer.Option(help="Presets, hub ids or folders.")] = None,
    settings: Annotated[str | None, typer.Option(help="W<bits>A<bits>[KV<bits>][g<group>][sym]")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks with options: wikitext2:windows=16,piqa:limit=100")] = None,
    calibration: Annotated[str | None, typer.Option(help="<corpus>[@<split>]:<windows>x<length>")] = None,
    data_root: DataRoot = None,
    out: Annotated[
        str | None, typer.Option(help="Run folder; the same command resumes it. Default: runs/<name>")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="local: on this machine; ray: on a cluster's")] = None,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster. Default: RAY_ADDRESS, or this one's")] = None,
    artifacts: Annotated[
        str | None, typer.Option(help="Where machines that do not share the run folder put files: s3://bucket/folder")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at a time. Default: 1; on a cluster, what fits.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each cell. Default: all processors.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a cell may take.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory that a cell may hold: 24GB")] = None,
    seed: Annotated[int | None, typer.Option(help="Of calibration windows and methods.")] = None,
    dtype: Annotated[str | None, typer.Option(help="default, float32, bfloat16, float16 or checkpoint")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    execute: Annotated[
        str | None, typer.Option(help="simulation, or kernels: score what the packed codes give")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each lm-eval task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put lm-eval's prompts into the model's chat template.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Also run again the cells that failed.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Use the file's table [quick] over its other keys.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html into the run folder after every cell, not only last.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Run methods over models, settings and tasks; resume a run that was stopped."""
    from harness import plan, request

    flags = {
        "methods": listed(methods), "models": listed(models), "settings": listed(settings), "tasks": listed(tasks),
        "calibration": calibration, "data_root": data_root, "out": out, "executor": executor,
        "address": address, "artifacts": artifacts, "jobs": jobs, "threads": threads,
        "timeout": timeout, "memory": memory, "seed": seed, "dtype": dtype, "device": device, "execute": execute,
        "limit": limit, "apply_chat_template": apply_chat_template or None,
    }  # fmt: skip
    if quick and file is None:
        raise HarnessError("--quick belongs to a file", fix="harness run sweep.toml --quick")
    keys = request.read_toml(file, quick=quick) if file else request.FileKeys({}, ())
    asked = request.request_from(keys.values, flags)
    draft = plan.draft(asked, keys.problems)
    folder = Path(asked.out or f"runs/{file.stem if file else asked.name}")
    tell("warning", draft.warnings)
    if dry_run:
        _print_plan(draft, folder)
        return
    _run(draft, asked, folder, retry=retry, report=report)


def _run(draft: Any, asked: Any, path: Path, *, retry: bool, report: bool) -> None:
    from harness import flags, livereport, results, running, tables
    from harness.display import watching
    from harness.pool import Interrupted
    from harness.runfolder import RunFolder

    limits = running.limits_of(asked)
    with watching() as shown, livereport.reporting(shown, path) if report else nullcontext(shown) as watcher:
        try:
            outcome = running.run(draft, asked, RunFolder(path), limits, watcher, retry=retry)
        except Interrupted as stop:
            raise typer.Exit(SIGNALLED + stop.signal) from None
    found = results.load(path)
    show(tables.score_grids(found), markdown=False)
    tell("warning", flags.no_better_than_guessing(found, path))
    if written := livereport.write_report(path):
        print(f"report: {written}   (harness report {path} --out <folder>: every format, and plots)")
    print(f"results: {path}   (harness results {path} --format markdown|csv|json)")
    if outcome.signal is not None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(SIGNALLED + outcome.signal)
    asked_for = {cell.id for cell in outcome.cells}
    ends = [result.last.status for result in found if result.cell.id in asked_for and result.last]
    if any(status not in ("ok", "unsupported") for status in ends):
        raise typer.Exit(FAILED)


def _print_plan(draft: Any, folder: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from harness import plan
    from harness.cells import BASELINE

    table = Table("model", "setting", "method", "tasks", title=Text(f"plan of {folder}"), title_justify="left")
    for model in draft.models:
        for method, setting in plan.pairs(draft):
            label = method.label if method else BASELINE
            table.add_row(*map(Text, (model.name, str(setting), label, " ".join(task.key for task in draft.tasks))))
    console().print(table)
    print(f"calibration {draft.calibration}, seed {draft.seed}, {draft.dtype} on {draft.device}")
