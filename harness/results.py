"""What a run folder has measured, as rows: for people (:mod:`harness.tables`), for programs (JSON, CSV)."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

import orjson

from harness.cells import Cell
from harness.errors import HarnessError
from harness.executors.depot import artifact_url
from harness.planfile import Plan, read_plan
from harness.runfolder import RunFolder
from harness.store import Attempt, Contents, Measured, Run, read

MEASUREMENT_KEYS = (
    "cell", "model", "method", "options", "setting", "task", "metric", "value", "stderr", "n", "status", "reason",
    "higher_is_better", "seconds", "created",
)  # fmt: skip
CELL_KEYS = (
    "cell", "model", "method", "options", "setting", "status", "reason", "quantize_seconds", "evaluate_seconds",
    "peak_memory_bytes", "bits_per_weight", "packed_bytes", "calibration_sha256", "artifact",
)  # fmt: skip
Row = dict[str, Any]
_NUMBERS = {float, int, bool, type(None)}
_FORMULAS = {"=", "+", "-", "@", "\t", "\r"}  # what makes a spreadsheet take text for one, at its beginning


@dataclass(frozen=True)
class CellResult:
    """A cell of the plan with all that the store knows of it. ``attempts`` is empty until one has ended."""

    cell: Cell
    attempts: list[Attempt] = field(default_factory=list)
    tasks: dict[str, list[Measured]] = field(default_factory=lambda: defaultdict(list))

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def failure(self) -> Attempt | None:
        """The last attempt that did not end well: why a task that was asked for has no number."""
        return next((row for row in reversed(self.attempts) if row.status != "ok"), None)


@dataclass(frozen=True)
class Loaded:
    """A run folder: what its cells share, the starts of its supervisor, and its cells in plan order."""

    plan: Plan
    starts: list[Run]
    results: list[CellResult]


def load(run: Path) -> list[CellResult]:
    """The cells of a run in plan order, also while it is going. Raises HarnessError where there is no run."""
    return load_run(run).results


def load_run(run: Path) -> Loaded:
    """All that plan and store say of a run. Raises HarnessError where there is no run."""
    folder = RunFolder(run)
    plan = read_plan(folder.plan)
    if plan is None:
        raise HarnessError(
            "no run here", where=str(run), fix="give the folder that `harness run --out` wrote to (it holds plan.json)"
        )
    contents = read(folder.store) if folder.store.is_file() else Contents([], [], [])
    found = {cell.id: CellResult(cell) for cell in plan.cells}
    for attempt in contents.attempts:
        if attempt.cell in found:  # rows of a method's earlier version stay in the store and out of the tables
            found[attempt.cell].attempts.append(attempt)
    for id, rows in groupby(contents.measured, itemgetter(0)):
        if (result := found.get(id)) is not None:
            tasks = result.tasks
            for row in rows:
                tasks[row[1]].append(row)
    return Loaded(plan, contents.runs, list(found.values()))


def unfinished(results: Iterable[CellResult]) -> int:
    """Cells that have not ended yet."""
    return sum(result.last is None for result in results)


def measurement_rows(results: Iterable[CellResult]) -> Iterator[Row]:
    """One row per number; one with a status and no number for each task that a cell did not get to."""
    for result in results:
        cell = result.cell
        for task in cell.tasks:
            for _, _, metric, value, stderr, n, higher_is_better, seconds, created in result.tasks.get(task, ()):
                # Written out, as a large run has many: a dict made of two others takes half as long again.
                yield {
                    "cell": cell.id, "model": cell.model, "method": cell.method, "options": cell.options,
                    "setting": cell.setting, "task": task, "metric": metric, "value": value, "stderr": stderr, "n": n,
                    "status": "ok", "reason": None, "higher_is_better": higher_is_better == 1,
                    "seconds": seconds, "created": created,
                }  # fmt: skip
            if task not in result.tasks and (failure := result.failure()) is not None:
                yield {
                    **_head(cell), "task": task, "metric": None, "value": None, "stderr": None, "n": None,
                    "status": failure.status, "reason": failure.reason, "higher_is_better": None,
                    "seconds": None, "created": failure.created,
                }  # fmt: skip


def cell_rows(results: Iterable[CellResult], run: Path) -> Iterator[Row]:
    """One row per cell that has ended."""
    for result in results:
        last, cell = result.last, result.cell
        if last is None:
            continue
        folder = RunFolder(run).cell(cell.id)
        spent = [row.evaluate_seconds for row in result.attempts if row.evaluate_seconds is not None]
        yield {
            **_head(cell), "status": last.status, "reason": last.reason, "quantize_seconds": last.quantize_seconds,
            "evaluate_seconds": sum(spent) if spent else None, "peak_memory_bytes": last.peak_memory_bytes,
            "bits_per_weight": last.bits_per_weight, "packed_bytes": last.packed_bytes,
            "calibration_sha256": cell.calibration_sha256,
            "artifact": str(folder.quantized.relative_to(run)) if folder.quantized.is_file() else artifact_url(folder),
        }  # fmt: skip


def write_json(rows: Iterable[Row], stream: TextIO) -> None:
    """An array with one object a line. The numbers are finite: the store holds no others."""
    rows, between = iter(rows), "[\n"
    while batch := list(islice(rows, 1000)):
        text = orjson.dumps(batch).decode()
        # Inside a JSON string the quotes would be escaped, so this is where one row ends and the next begins.
        stream.write(between + text[1:-1].replace('},{"cell":', '},\n{"cell":'))
        between = ",\n"
    stream.write("\n]\n" if between == ",\n" else "[\n]\n")


def write_csv(rows: Iterable[Row], keys: tuple[str, ...], stream: TextIO) -> None:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows(map(_csv_values, map(itemgetter(*keys), rows)))


def _csv_values(values: tuple[Any, ...]) -> list[Any]:
    return [value if type(value) in _NUMBERS else csv_value(value) for value in values]


def _head(cell: Cell) -> Row:
    return {
        "cell": cell.id, "model": cell.model, "method": cell.method, "options": dict(cell.options),
        "setting": cell.setting,
    }  # fmt: skip


def csv_value(value: object) -> object:
    """What a place of a CSV file gets: no text in it is a formula."""
    if isinstance(value, dict):
        value = orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode() if value else "{}"
    if isinstance(value, str) and value[:1] in _FORMULAS:
        return "'" + value
    return value
