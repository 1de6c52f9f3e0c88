"""The command line: words in, one call each, tables out. Heavy modules are imported by nobody here."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.errors import HarnessError, Infrastructure

_FAILED, _WRONG_USE, _SIGNALLED = 1, 2, 128

app = typer.Typer(
    name="harness",
    help="Compare post-training quantization methods for language models on equal terms.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)
models_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
methods_app = typer.Typer(help="Write and check methods.", no_args_is_help=True)
app.add_typer(methods_app, name="methods")
data_app = typer.Typer(help="Data for tasks.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class Format(StrEnum):
    table = "table"
    markdown = "markdown"
    csv = "csv"
    json = "json"


class ReportFormat(StrEnum):
    table = "table"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    html = "html"


class Listing(StrEnum):
    methods = "methods"
    models = "models"
    tasks = "tasks"
    settings = "settings"
    kernels = "kernels"


DataRoot = Annotated[
    str | None, typer.Option(envvar="HARNESS_DATA_ROOT", help="Folder of datasets laid out as on the hub.")
]


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
    jobs: Annotated[int | None, typer.Option(help="Cells at a time.")] = None,
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
        "methods": _listed(methods), "models": _listed(models), "settings": _listed(settings), "tasks": _listed(tasks),
        "calibration": calibration, "data_root": data_root, "out": out, "jobs": jobs, "threads": threads,
        "timeout": timeout, "memory": memory, "seed": seed, "dtype": dtype, "device": device, "execute": execute,
        "limit": limit, "apply_chat_template": apply_chat_template or None,
    }  # fmt: skip
    if quick and file is None:
        raise HarnessError("--quick belongs to a file", fix="harness run sweep.toml --quick")
    asked = request.request_from(request.read_toml(file, quick=quick) if file else {}, flags)
    draft = plan.draft(asked)
    folder = Path(asked.out or f"runs/{file.stem if file else asked.name}")
    for warning in draft.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        _print_plan(draft, folder)
        return
    _run(draft, asked, folder, retry=retry, report=report)


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
    for line in flags.worse_than_guessing(found, run):
        print(f"warning: {line}", file=sys.stderr)
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
        _show(tables.cell_grids(found) if cells else tables.score_grids(found), markdown=format is Format.markdown)


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
    for note in found.gathered.notes:
        print(f"note: {note}", file=sys.stderr)
    if out is not None:
        for path in found.write(out):
            print(path)
    elif to is not None:
        found.print_to(to, format.value, ledger=ledger)
    else:
        found.print(_console(), format.value, ledger=ledger)


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
    for note in gathered.notes:
        print(f"note: {note}", file=sys.stderr)
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

    gate = gates.compare_runs(baseline, candidate, gates.read_margins(_listed(margins) or ()))
    grids = gates.grids(gate)
    if markdown:
        atomic.write_text(markdown, f"{gate.summary()}\n\n{tables.markdown(grids)}")
    if junit:
        atomic.write_text(junit, as_junit(gate))
    for warning in gate.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _show(grids, markdown=False)
    print(gate.summary())
    if gate.failed:
        raise typer.Exit(_FAILED)


@app.command("list", epilog="Example: harness list methods")
def list_(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List methods, models, tasks, settings or kernels."""
    from rich.table import Table
    from rich.text import Text

    from harness import listing

    table = Table("name", "what it is", "options", title=Text(what.value), title_justify="left")
    for row in listing.rows(what.value):
        table.add_row(*map(Text, row))
    _console().print(table)


@models_app.command("fetch", epilog="Example: harness models fetch smollm2-135m")
def fetch_model(name: Annotated[str, typer.Argument(help="A preset or a hub id.")]) -> None:
    """Bring a model to this machine."""
    from harness.fetch import fetch
    from harness.presets import resolve_model

    print(fetch(resolve_model(name), _say))


@app.command("export", epilog="Example: harness export runs/first/cells/0123456789abcdef --format gptq --to exported")
def export_cell(
    cell: Annotated[Path, typer.Argument(help="A finished cell's folder, or its artifact.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[str, typer.Option(help="native, gptq or compressed-tensors")] = "native",
) -> None:
    """Write a finished cell as a checkpoint that other programs load."""
    from harness.export import export

    print(export(cell, format, to))


@methods_app.command("check", epilog="Example: harness methods check ./my_method.py")
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
        raise typer.Exit(_SIGNALLED + interrupted_by)
    if failed:
        raise typer.Exit(_FAILED)


@methods_app.command("new", epilog="Example: harness methods new my_method")
def new_method(
    name: Annotated[str, typer.Argument(help="Of the method: letters, digits and underscores.")],
    here: Annotated[bool, typer.Option("--here", help="Only the method's file, in this folder.")] = False,
) -> None:
    """Write an installable package with one method that works at once."""
    from harness.scaffold import write_method

    for path in write_method(name, Path.cwd(), only_file=here):
        print(path)


def _say(stage: str, done: int, total: int, detail: str = "") -> None:
    print(f"{stage} {done}/{total} {detail}", file=sys.stderr)


@data_app.command("mirror", epilog="Example: harness data mirror zeroshot6 mmlu wikitext2 --to ../data")
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
    findings = [*doctor.examine(root, hub=hub), *doctor.examine_tasks(_listed(tasks) or (), root)]
    for finding in findings:
        table.add_row(Text(finding.what), Text(finding.state, style=colours[finding.state]), Text(finding.detail))
    _console().print(table)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(_FAILED)


@app.command(epilog="Example: harness bench --models llama2-7b --settings W4A16g128,W4A8 --tokens 1,16,128")
def bench(
    models: Annotated[
        str, typer.Option(help="Whose layer shapes: presets, or checkpoints on this machine.")
    ] = "llama2-7b",
    settings: Annotated[str, typer.Option(help="Kernel paths, as settings.")] = "W4A16g128,W4A8",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, 1 to 4096.")] = "1,4,16,128",
    out: Annotated[Path, typer.Option(help="Folder for the raw samples.")] = Path("runs/bench"),
    static: Annotated[bool, typer.Option("--static", help="Compile for every GPU and look; time nothing.")] = False,
    targets: Annotated[str, typer.Option(help="With --static: sm_80,…,gfx942.")] = "",
    tighten: Annotated[bool, typer.Option("--tighten", help="With --static: record loops that got shorter.")] = False,
) -> None:
    """Time the kernels that run here, or look at compiled ones for GPUs that are not here."""
    from harness import benchmarking

    if static:
        faults = benchmarking.static(_listed(targets) or (), out, _console(), tighten=tighten)
        if faults:
            raise typer.Exit(_FAILED)
    else:
        benchmarking.timed(_listed(models) or (), _listed(settings) or (), _listed(tokens) or (), out, _console())


def main() -> None:
    """The entry point: a mistake of the user's is told plainly, and a closed stdout is no error."""
    _speak_utf8()
    try:
        app()
    except Infrastructure as error:
        _quit(str(error), _FAILED)
    except HarnessError as error:
        _quit(str(error), _WRONG_USE)
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _speak_utf8() -> None:
    """A file or a pipe gets the same bytes whatever the locale; a terminal may show question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def _run(draft: Any, asked: Any, path: Path, *, retry: bool, report: bool) -> None:
    from harness import flags, livereport, results, running, tables
    from harness.display import watching
    from harness.runfolder import RunFolder

    limits = running.limits_of(asked)
    with watching() as shown, livereport.reporting(shown, path) if report else nullcontext(shown) as watcher:
        try:
            outcome = running.run(draft, asked, RunFolder(path), limits, watcher, retry=retry)
        except running.Interrupted as stop:
            raise typer.Exit(_SIGNALLED + stop.signal) from None
    found = results.load(path)
    _show(tables.score_grids(found), markdown=False)
    for line in flags.worse_than_guessing(found, path):
        print(f"warning: {line}", file=sys.stderr)
    if written := livereport.write_report(path):
        print(f"report: {written}   (harness report {path} --out <folder>: every format, and plots)")
    print(f"results: {path}   (harness results {path} --format markdown|csv|json)")
    if outcome.signal is not None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(_SIGNALLED + outcome.signal)
    asked_for = {cell.id for cell in outcome.cells}
    ends = [result.last.status for result in found if result.cell.id in asked_for and result.last]
    if any(status not in ("ok", "unsupported") for status in ends):
        raise typer.Exit(_FAILED)


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
    _console().print(table)
    print(f"calibration {draft.calibration}, seed {draft.seed}, {draft.dtype} on {draft.device}")


def _show(grids: Any, *, markdown: bool) -> None:
    from harness import tables

    if markdown or tables.is_long(grids):
        print(tables.markdown(grids), end="")
    else:
        _console().print(tables.rendered(grids))


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _console() -> Any:
    """Standard output; wide where nobody sees it, so that a file or a pipe gets whole lines."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def _quit(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
