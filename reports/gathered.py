"""The cells of one or several run folders: put together where they may be compared, kept apart where they may not.

Cells stand in one table when they share the model's weights, the calibration tokens, seed, precision and device. The
same cell measured on several machines is one cell. Whatever was kept apart, or found twice with other numbers, is
told in the notes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness.cells import Cell
from harness.errors import HarnessError
from harness.planfile import ordered
from harness.results import CellResult, Loaded, load_run
from harness.runfolder import CellFolder, RunFolder
from harness.store import Measured, Run
from harness.tasks.result_files import read_summary

_CHANGE_NO_NUMBER = ("batch_size", "head", "python", "guessing")  # facts of a task's manifest


class Terms(NamedTuple):
    """What all cells of a table share."""

    model: str
    weights_sha256: str
    calibration: str
    calibration_sha256: str | None
    seed: str
    dtype: str
    device: str
    execute: str

    @property
    def words(self) -> str:
        """For a caption."""
        tokens = f" ({self.calibration_sha256[:8]})" if self.calibration_sha256 else ""
        by = "" if self.execute == "simulation" else f", executed by {self.execute}"
        return f"calibration {self.calibration}{tokens}, seed {self.seed}, {self.dtype} on {self.device}{by}"


@dataclass(frozen=True)
class Source:
    """A run folder; reports call it by its ``name``, which tells nothing of the machine it lies on."""

    name: str
    path: Path
    starts: tuple[Run, ...] = field(hash=False)


class Origin(NamedTuple):
    """Where the result of a task lies: in which run, under which name."""

    source: Source
    task: str


@dataclass(frozen=True)
class Known:
    """A cell with what is known of it, and for each task where its result lies."""

    result: CellResult
    source: Source
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        return self.result.cell

    @property
    def folder(self) -> CellFolder:
        return RunFolder(self.source.path).cell(self.cell.id)

    @property
    def bits(self) -> float | None:
        return self.result.last.bits_per_weight if self.result.last else None

    def row(self, task: str) -> Measured | None:
        """The main number of a task: its first metric."""
        rows = self.result.tasks.get(task)
        return rows[0] if rows else None

    def status(self, task: str) -> str:
        """The word where there is no number."""
        if task not in self.cell.tasks:
            return "not asked"
        failure = self.result.failure()
        return failure.status if failure else "pending"

    def place(self, task: str) -> tuple[Path, str]:
        """The folder of a task's result, and its name there."""
        source, name = self.origins[task]
        return RunFolder(source.path).cell(self.cell.id).tasks, name

    def kept_tasks(self) -> list[str]:
        """The tasks whose files lie in a run folder: a store may have been copied without them."""
        sources = {origin.source.name: origin.source for origin in self.origins.values()}
        there = {name: RunFolder(each.path).cell(self.cell.id).tasks.is_dir() for name, each in sources.items()}
        return [task for task, origin in self.origins.items() if there[origin.source.name]]

    def manifest(self, task: str) -> dict[str, Any]:
        """How a task was measured; empty where the run folder holds the store alone."""
        summary = read_summary(*self.place(task))
        return dict(summary["manifest"]) if summary else {}


@dataclass(frozen=True)
class Group:
    """The cells of one table."""

    terms: Terms
    cells: list[Known]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for known in self.cells for task in known.cell.tasks))

    @property
    def baseline(self) -> Known | None:
        return next((known for known in self.cells if known.cell.is_baseline), None)

    def label(self, known: Known) -> str:
        """The method with its options; with the cell's id where versions of the code made several cells of one."""
        return f"{known.cell.label} [{known.cell.id[:6]}]" if known.cell.place in self._shared else known.cell.label

    @functools.cached_property
    def _shared(self) -> set[tuple[str, str, str]]:
        counts = Counter(known.cell.place for known in self.cells)
        return {place for place, count in counts.items() if count > 1}


@dataclass(frozen=True)
class Gathered:
    sources: tuple[Source, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """How many main numbers there are: one for each task of each cell that has been measured."""
        return sum(len(known.result.tasks) for _, known in self.cells())

    def cells(self) -> Iterator[tuple[Group, Known]]:
        for group in self.groups:
            for known in group.cells:
                yield group, known


def gather(runs: Sequence[Path]) -> Gathered:
    """Read run folders. Raises HarnessError where there is none, or its store is damaged."""
    if not runs:
        raise HarnessError("no run was named", fix="give one or more folders that `harness run --out` wrote to")
    notes: list[str] = []
    groups: dict[Terms, dict[str, Known]] = {}
    sources = []
    for path, name in zip(runs, _names(runs), strict=True):
        loaded = load_run(path)
        source = Source(name, path, tuple(loaded.starts))
        sources.append(source)
        for result in loaded.results:
            cells = groups.setdefault(_terms(loaded, result.cell), {})
            new = Known(result, source, {task: Origin(source, task) for task in result.tasks})
            old = cells.get(result.cell.id)
            cells[result.cell.id] = new if old is None else _merged(old, new, notes)
    if len(runs) > 1:
        groups = {terms: _with_versions_apart(terms, cells, notes) for terms, cells in groups.items()}
    notes += _kept_apart(list(groups))
    return Gathered(tuple(sources), tuple(Group(t, _in_order(cells)) for t, cells in groups.items()), tuple(notes))


def _terms(loaded: Loaded, cell: Cell) -> Terms:
    facts = loaded.plan.facts.get(cell.model)
    calibrated = facts.calibration_sha256 if facts else cell.calibration_sha256
    return Terms(
        cell.model, cell.weights_sha256, cell.calibration, calibrated, str(cell.seed), cell.dtype, cell.device,
        cell.execute,
    )  # fmt: skip


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, numbered where several have the same."""
    names = [path.resolve().name for path in runs]
    count = Counter(names)
    seen: Counter[str] = Counter()
    seen_names = []
    for name in names:
        seen[name] += 1
        seen_names.append(f"{name} ({seen[name]})" if count[name] > 1 else name)
    return seen_names


def _merged(old: Known, new: Known, notes: list[str]) -> Known:
    """One cell of two runs: the first that ended well, with the tasks of both."""
    ended = [known for known in (old, new) if known.result.last is not None and known.result.last.status == "ok"]
    base, other = (new, old) if ended == [new] else (old, new)
    tasks = dict(base.result.tasks)
    origins = dict(base.origins)
    for task, rows in other.result.tasks.items():
        if task not in tasks:
            tasks[task], origins[task] = rows, other.origins[task]
            continue
        for one, two in zip(tasks[task], rows, strict=False):
            if (one.metric, one.value) != (two.metric, two.value):
                notes.append(
                    f"{base.cell.model} {base.cell.setting} {base.cell.label}, {task}: {one.metric} is "
                    f"{one.value:.6g} in {base.source.name} and {two.value:.6g} in {other.source.name}; "
                    f"the first is shown"
                )  # fmt: skip
    cell = replace(base.cell, tasks=tuple(dict.fromkeys([*base.cell.tasks, *other.cell.tasks])))
    return Known(CellResult(cell, base.result.attempts, tasks), base.source, origins)


def _with_versions_apart(terms: Terms, cells: dict[str, Known], notes: list[str]) -> dict[str, Known]:
    """Where two runs measured a task in other ways, the later run's numbers go under a name of their own."""
    first: dict[str, Known] = {}
    names: dict[Origin, str] = {}
    for known in cells.values():
        for task, origin in known.origins.items():
            before = first.setdefault(task, known).origins[task]
            if origin.source.name == before.source.name or origin in names:
                continue
            differing = _differing(first[task].manifest(task), known.manifest(task))
            names[origin] = f"{task} [{origin.source.name}]" if differing else task
            if differing:
                notes.append(
                    f"{terms.model}, {task}: {before.source.name} and {origin.source.name} measured it in other ways "
                    f"({', '.join(differing)}); their numbers stand in columns of their own"
                )
    return {id: _renamed(known, names) for id, known in cells.items()}


def _renamed(known: Known, names: Mapping[Origin, str]) -> Known:
    new = {task: names.get(origin, task) for task, origin in known.origins.items()}
    if all(task == name for task, name in new.items()):
        return known
    cell = replace(known.cell, tasks=tuple(new.get(task, task) for task in known.cell.tasks))
    result = CellResult(cell, known.result.attempts, {new[task]: rows for task, rows in known.result.tasks.items()})
    return Known(result, known.source, {new[task]: origin for task, origin in known.origins.items()})


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = sorted((one.keys() | other.keys()) - set(_CHANGE_NO_NUMBER))
    return [name for name in names if one.get(name) != other.get(name)]


def _kept_apart(terms: Sequence[Terms]) -> Iterator[str]:
    for model in dict.fromkeys(each.model for each in terms):
        those = [each for each in terms if each.model == model]
        if len(those) > 1:
            differing = [name for name in Terms._fields if len({getattr(each, name) for each in those}) > 1]
            yield (
                f"{model}: {len(those)} tables, which are not to be compared with one another: the runs differ in "
                f"{', '.join(differing)}"
            )  # fmt: skip


def _in_order(cells: Mapping[str, Known]) -> list[Known]:
    return [cells[cell.id] for cell in ordered(known.cell for known in cells.values())]
