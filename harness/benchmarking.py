"""``harness bench``: words in, tables out. What is measured and what is predicted never share a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from harness import atomic, provenance
from harness.errors import HarnessError, Problems, Unsupported
from harness.settings import Setting

_MOST_TOKENS = 4096


def timed(models: Sequence[str], settings: Sequence[str], tokens: Sequence[str], out: Path, console: Any) -> None:
    """Time paths × shapes × tokens on this machine's CPU, print the table, keep the samples.

    Raises Problems for numbers and settings that are none, before anything is computed.
    """
    counts, paths = _tokens(tokens), [Setting.parse(text) for text in settings]
    from harness.kernels import bench

    shapes = bench.shapes_of(models)
    columns = (
        "setting", "operator", "layer", "tokens", "phase", "median µs", "quartiles µs", "× bf16", "× fp32",
        "over bare operator", "% of bandwidth", "",
    )  # fmt: skip
    table = Table(*columns, title=Text(f"measured on {provenance.cpu()['name']}, 1 thread"), title_justify="left")
    timings = []
    for setting in paths:
        try:
            for timing in bench.bench([setting], shapes, counts):
                timings.append(timing)
                table.add_row(*_cells(timing.as_dict()))
        except Unsupported as error:
            console.print(Text(f"{setting}: not measured ({error.what})"))
    console.print(table)
    console.print(Text(f"GPU: {bench.NO_CUDA if not provenance.gpus() else 'run python -P benchmarks/gpu_verify.py'}"))
    console.print(Text(f"samples: {bench.save(timings, out)}"))


def static(targets: Sequence[str], out: Path, console: Any, *, tighten: bool) -> int:
    """Compile every shipped configuration and print what it came to; returns how many have faults."""
    from harness.kernels import static as analysis
    from harness.kernels.configs import TARGETS

    if unknown := [target for target in targets if target not in TARGETS]:
        raise HarnessError(f"no target {', '.join(unknown)}", fix=f"choose from {', '.join(TARGETS)}")
    columns = (
        "kernel", "target", "registers", "stack", "shared KiB", "matrix instruction", "copies by bytes", "loop",
        "of them matrix", "conversions", "faults",
    )  # fmt: skip
    table = Table(*columns, title=Text("compiled, never run on a GPU here"), title_justify="left")
    record = analysis.read_ratchet()
    rows = []
    for row in analysis.examine(targets or TARGETS, ratchet=record):
        rows.append(row)
        table.add_row(*_static_cells(row.as_dict()))
    console.print(table)
    console.print(_predictions())
    if tighten:
        analysis.write_ratchet(analysis.tightened(record, rows))
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(
        out / "static.json", {"triton": provenance.version("triton"), "rows": [r.as_dict() for r in rows]}
    )
    faulty = sum(bool(row.faults) for row in rows)
    console.print(Text(f"{len(rows)} compiled, {faulty} with faults"))
    return faulty


def _predictions() -> Table:
    """The roofline's lower bounds for a 4096 × 4096 layer."""
    from harness.kernels.roofline import GPUS, Work, predict

    works = {
        "fp16": (16, 16, None), "W4A16g128": (4, 16, 128), "W2A16g128": (2, 16, 128), "W4A8": (4, 8, None),
    }  # fmt: skip
    table = Table("path", "tokens", *(gpu.name for gpu in GPUS), title_justify="left",
                  title=Text("predicted by the roofline, not measured: at least so many µs, 4096 × 4096"))  # fmt: skip
    for name, (weight_bits, activation_bits, group) in works.items():
        for count in (1, 16, 128, 2048):
            work = Work(count, 4096, 4096, weight_bits, activation_bits, group)
            bounds = (predict(work, gpu) for gpu in GPUS)
            table.add_row(name, str(count), *(f"{1e6 * b.seconds_at_least:.1f} {b.bound_by}" for b in bounds))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["quartiles_seconds"]
    return (
        row["setting"], row["operator"], f"{row['outputs']}×{row['inputs']}", str(row["tokens"]), row["phase"],
        f"{1e6 * row['median_seconds']:.0f}", f"{1e6 * low:.0f}–{1e6 * high:.0f}", f"{row['faster_than_bf16']:.2f}",
        f"{row['faster_than_fp32']:.2f}", f"{100 * (row['slower_than_bare_operator'] - 1):+.1f} %",
        f"{row['percent_of_bandwidth']:.0f}", "the machine drifted" if row["drifted"] else "",
    )  # fmt: skip


def _static_cells(row: dict[str, Any]) -> tuple[str, ...]:
    copies = " ".join(f"{count}×{width}" for width, count in row["copy_bytes"].items())
    shown = (row["loop_instructions"], row["loop_matrix_instructions"], row["loop_conversions"])
    return (
        row["kernel"], row["target"], str(row["registers"]), str(row["stack_bytes"]),
        f"{row['shared_bytes'] / 1024:.1f}", row["matrix_instruction"] or "–", copies or "–",
        *("–" if value is None else str(value) for value in shown), "; ".join(row["faults"]),
    )  # fmt: skip


def _tokens(texts: Sequence[str]) -> list[int]:
    wrong = [text for text in texts if not (text.isdecimal() and 1 <= int(text) <= _MOST_TOKENS)]
    if wrong or not texts:
        fix = f"whole numbers from 1 to {_MOST_TOKENS}: --tokens 1,16,128"
        raise Problems([HarnessError(f"{text!r} is no number of tokens", fix=fix) for text in wrong or ("",)])
    return [int(text) for text in texts]
