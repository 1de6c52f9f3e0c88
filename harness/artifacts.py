"""What workers left in the folders of their cells, read as rows of the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.endings import STATUSES
from harness.errors import BadOutput, HarnessError
from harness.runfolder import CellFolder
from harness.store import Attempt, Measured
from harness.tasks.result_files import read_summary


def now() -> str:
    """The time in UTC, as the store keeps it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def measured(cell_id: str, folder: CellFolder, task: str) -> list[Measured]:
    """The rows of a task, empty while it is not final. Raises BadOutput when they are not what a worker writes."""
    try:
        summary = read_summary(folder.tasks, task)
    except HarnessError as error:
        raise BadOutput(error.what, where=error.where, fix=error.fix) from error
    if summary is None:
        return []
    try:
        return [
            Measured(
                cell=cell_id,
                task=task,
                metric=str(row["metric"]),
                value=float(row["value"]),
                stderr=None if row["stderr"] is None else float(row["stderr"]),
                n=int(row["n"]),
                higher_is_better=int(bool(row["higher_is_better"])),
                seconds=float(summary["seconds"]),
                created=now(),
            )
            for row in summary["measurements"]
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadOutput(f"{task}: not a task's result: {error!r}", where=str(folder.tasks)) from error


def result(folder: CellFolder) -> dict[str, Any] | None:
    """How the worker said that it ended, None if it did not get to say. Raises BadOutput for nonsense."""
    if not folder.end.is_file():
        return None
    return checked_end(_object(folder.end))


def checked_end(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` if it is what a worker says last. Raises BadOutput otherwise."""
    match value:
        case {"status": str(status), "attempt": int(), "reason": str() | None} if status in STATUSES:
            return value
    raise BadOutput(f"not the end of an attempt: {value!r:.200}")


def quantized(folder: CellFolder) -> dict[str, Any]:
    """What the worker wrote about the quantized model, empty before there is one. Raises BadOutput for nonsense."""
    return _object(folder.quantized_report) if folder.quantized_report.is_file() else {}


def attempt(
    cell_id: str, number: int, run: int, *, status: str, reason: str | None, returncode: int | None,
    said: Mapping[str, Any], quantized: Mapping[str, Any], peak_bytes: int | None,
) -> Attempt:  # fmt: skip
    """The row of an attempt that ended, with what its worker ``said`` last and wrote about the ``quantized`` model."""
    return Attempt(
        cell=cell_id,
        attempt=number,
        run=run,
        status=status,
        reason=None if status == "ok" else reason or "no reason was given",
        returncode=returncode,
        load_seconds=said.get("load_seconds"),
        quantize_seconds=quantized.get("quantize_seconds"),
        evaluate_seconds=said.get("evaluate_seconds"),
        peak_memory_bytes=said.get("peak_memory_bytes") or peak_bytes,
        bits_per_weight=quantized.get("bits_per_weight"),
        packed_bytes=quantized.get("packed_bytes"),
        created=now(),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BadOutput(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise BadOutput("not a JSON object", where=str(path))
    return value
