"""What is wrong with a number though it is one: told beside every table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.results import CellResult
from harness.runfolder import RunFolder
from harness.tables import number
from harness.tasks.result_files import read_summary

_PER_TOKEN = "token_perplexity"


def worse_than_guessing(results: Sequence[CellResult], run: Path) -> list[str]:
    """A line for each token perplexity above the vocabulary's size: every token equally likely would score better."""
    sizes: dict[str, int] = {}
    for result in results:
        if result.cell.model not in sizes and (size := _vocabulary(result, run)):
            sizes[result.cell.model] = size
    if not sizes:
        return []
    return [
        f"{result.cell.model} {result.cell.setting} {result.cell.label}: {task} perplexity {number(row.value)} is "
        f"above the {sizes[result.cell.model]} tokens of the vocabulary: worse than guessing"
        for result in results
        for task, rows in result.tasks.items()
        for row in rows
        if row.metric == _PER_TOKEN and row.value > sizes.get(result.cell.model, row.value)
    ]


def _vocabulary(result: CellResult, run: Path) -> int | None:
    """From the first of the cell's tasks that says it; the files of other cells are not opened for it."""
    if not any(row.metric == _PER_TOKEN for rows in result.tasks.values() for row in rows):
        return None
    for task in result.tasks:
        summary = read_summary(RunFolder(run).cell(result.cell.id).tasks, task)
        if summary and "vocabulary" in summary["manifest"]:
            return int(summary["manifest"]["vocabulary"])
    return None
