"""``harness bench``: words in, tables out. What is measured and what is predicted never share a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from harness import atomic, provenance, tables
from harness.errors import HarnessError, Problems, Unsupported
from harness.kernels.benchfile import NO_CUDA, Timing
from harness.reports import kernel_tables
from harness.settings import Setting

_MOST_TOKENS = 4096


def timed(
    models: Sequence[str], settings: Sequence[str], tokens: Sequence[str], out: Path, console: Any, *, device: str
) -> None:
    """Time paths × shapes × tokens on ``device`` (cpu, cuda), print the table, keep the samples.

    Raises Problems for numbers and settings that are none and HarnessError for no GPU, before anything is computed.
    """
    counts, paths = _tokens(tokens), [Setting.parse(text) for text in settings]
    if device == "cuda" and provenance.default_device() != "cuda":
        raise HarnessError(f"GPU: {NO_CUDA}", fix="--device cpu")
    from harness.kernels import bench
    from harness.kernels.machines import Cpu, Gpu, Machine

    shapes = bench.shapes_of(models)
    machine: Machine = Gpu() if device == "cuda" else Cpu()
    timings: list[Timing] = []
    for setting in paths:
        try:
            timings += bench.bench([setting], shapes, counts, machine)
        except Unsupported as error:
            console.print(Text(f"{setting}: not measured ({error.what})"))
    found = bench.record(timings, machine)
    for grid in kernel_tables.grids([found]):
        console.print(tables.rendered([grid]))
    if provenance.default_device() != "cuda":
        console.print(Text(f"GPU: {NO_CUDA}"))
    console.print(Text(f"samples: {found.write(out)}"))


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
    rows: list[analysis.Row] = []
    for target in targets or TARGETS:
        start = time.monotonic()
        found = list(analysis.examine([target], ratchet=record))
        console.print(Text(f"{target}: {len(found)} compiled in {time.monotonic() - start:.0f} s"))
        rows += found
    for row in rows:
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
    """The roofline's lower bounds for a 4096 × 4096 layer, and the bytes that they are made of.

    The grid's requests are those of the configuration shipped for an A100; what its caches answer never reaches memory.
    """
    from harness.kernels.configs import GEMV_ROWS, Kernel, choose
    from harness.kernels.roofline import GPUS, Work, predict

    side, works = 4096, {
        "fp16": (16, 16, None), "W4A16g128": (4, 16, 128), "W2A16g128": (2, 16, 128), "W4A8": (4, 8, None),
    }  # fmt: skip
    table = Table("path", "tokens", "MB", "MB asked for by the grid", *(gpu.name for gpu in GPUS), title_justify="left",
                  title=Text("predicted by the roofline, not measured: at least so many µs, 4096 × 4096"))  # fmt: skip
    for name, (weight_bits, activation_bits, group) in works.items():
        for count in (1, 16, 128, 2048):
            work = Work(count, side, side, weight_bits, activation_bits, group)
            kernel: Kernel = "wna8" if activation_bits < 16 else "wna16_gemv" if count <= GEMV_ROWS else "wna16"
            asked = work.requested_bytes(choose(kernel, "sm_80", count, side, side, processors=108))
            bounds = (predict(work, gpu) for gpu in GPUS)
            table.add_row(
                name, str(count), f"{work.bytes / 1e6:.1f}", "–" if weight_bits == 16 else f"{asked / 1e6:.1f}",
                *(f"{1e6 * b.seconds_at_least:.1f} {b.bound_by}" for b in bounds),
            )  # fmt: skip
    return table


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
