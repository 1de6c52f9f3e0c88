"""Results as a table for people: a row per cell, a column per task, a number or a status word in every place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from harness.limits import show_bytes
from harness.results import CellResult

if TYPE_CHECKING:  # Markdown is written without it
    from rich.console import RenderableType

PENDING = "pending"
MANY_ROWS = 500
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#~"} | dict.fromkeys("\n\r\t", " "))
_MARKED = re.compile(r"[\\`*_\[\]<>|#~\n\r\t]").search


@dataclass(frozen=True)
class Grid:
    """A table of one model as text."""

    model: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def score_grids(results: Sequence[CellResult]) -> list[Grid]:
    """A grid per model: the baseline on top, then settings, then methods. A task's first metric is its main one."""
    grids = []
    for model, group in groupby(results, key=lambda result: result.cell.model):
        members = list(group)
        tasks = list(dict.fromkeys(task for result in members for task in result.cell.tasks))
        header = ("method", "setting", "bits/weight", *(_column(task, members) for task in tasks))
        grids.append(Grid(model, header, tuple(_score_row(result, tasks) for result in members)))
    return grids


def cell_grids(results: Sequence[CellResult]) -> list[Grid]:
    """A grid per model of how its cells ended and what they cost."""
    header = ("cell", "method", "setting", "status", "quantize s", "evaluate s", "peak memory", "size", "reason")
    return [
        Grid(model, header, tuple(_cell_row(result) for result in group))
        for model, group in groupby(results, key=lambda result: result.cell.model)
    ]


def is_long(grids: Sequence[Grid]) -> bool:
    """Whether laying the tables out for a terminal would take seconds and be of no use there."""
    return sum(len(grid.rows) for grid in grids) > MANY_ROWS


def rendered(grids: Sequence[Grid]) -> RenderableType:
    """For a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables = []
    for grid in grids:
        table = Table(title=Text(grid.model, style="bold"), title_justify="left")
        for number, name in enumerate(grid.header):
            table.add_column(Text(name), justify="left" if number < 2 else "right")
        for row in grid.rows:
            table.add_row(*(Text(value) for value in row))
        tables.append(table)
    return Group(*tables)


def markdown(grids: Sequence[Grid]) -> str:
    """GitHub tables, one a model, with every name escaped."""
    parts = []
    for grid in grids:
        lines = [_markdown_row(grid.header), "|" + " --- |" * len(grid.header), *map(_markdown_row, grid.rows)]
        parts.append(f"**{escaped(grid.model)}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _column(task: str, members: Sequence[CellResult]) -> str:
    rows = next((result.tasks[task] for result in members if task in result.tasks), None)
    return f"{task} {rows[0].metric} {'↑' if rows[0].higher_is_better else '↓'}" if rows else task


def _score_row(result: CellResult, tasks: Sequence[str]) -> tuple[str, ...]:
    cell, last = result.cell, result.last
    bits = f"{last.bits_per_weight:.2f}" if last and last.bits_per_weight else "–"
    return (cell.label, cell.setting, bits, *[_score(result, task) for task in tasks])


def _score(result: CellResult, task: str) -> str:
    if rows := result.tasks.get(task):
        row = rows[0]
        return number(row.value) if row.stderr is None else f"{number(row.value)} ± {number(row.stderr)}"
    if task not in result.cell.tasks:
        return "not asked"
    failure = result.failure()
    return failure.status if failure else PENDING


def _cell_row(result: CellResult) -> tuple[str, ...]:
    cell, last = result.cell, result.last
    if last is None:
        return (cell.id, cell.label, cell.setting, PENDING, "–", "–", "–", "–", "")
    seconds = [f"{value:.1f}" if value is not None else "–" for value in (last.quantize_seconds, last.evaluate_seconds)]
    sizes = [show_bytes(size) if size is not None else "–" for size in (last.peak_memory_bytes, last.packed_bytes)]
    return (cell.id, cell.label, cell.setting, last.status, *seconds, *sizes, last.reason or "")


def number(value: float) -> str:
    """About four digits that matter."""
    if -1 < value < 1:
        return f"{value:.4f}"
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:.4g}"


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, values)) + " |"


def escaped(text: str) -> str:
    """Text that GitHub's Markdown shows as it is."""
    return text.translate(_MARKDOWN) if _MARKED(text) else text
