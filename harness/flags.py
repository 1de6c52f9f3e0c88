"""What is wrong with a number though it is one: told beside every table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.results import CellResult
from harness.runfolder import RunFolder
from harness.tables import number
from harness.tasks.result_files import read_summary

_PER_TOKEN = "token_perplexity"
_STANDARD_ERRORS = 2  # above what guessing scores, up to which a score may well be a guesser's


def no_better_than_guessing(results: Sequence[CellResult], run: Path) -> list[str]:
    """A line for each perplexity above the vocabulary's size, where every token equally likely would score better, and
    for each accuracy that drawing answers at random may well reach.
    """
    suspicions = _Suspicions(run)
    lines = []
    for result in results:
        for task, rows in result.tasks.items():
            for row in rows:
                suspicion = suspicions.of(result, task, row.metric)
                if suspicion is not None and suspicion.holds(row.value):
                    cell = result.cell
                    lines.append(
                        f"{cell.model} {cell.setting} {cell.label}: {task} {row.metric} {number(row.value)} {suspicion}"
                    )
    return lines


@dataclass(frozen=True)
class _TooHigh:
    """A perplexity."""

    vocabulary: int

    def holds(self, value: float) -> bool:
        return value > self.vocabulary

    def __str__(self) -> str:
        return f"is above the {self.vocabulary} tokens of the vocabulary: worse than guessing"


@dataclass(frozen=True)
class _Guessed:
    """An accuracy."""

    score: float
    error: float

    def holds(self, value: float) -> bool:
        return value <= self.score + _STANDARD_ERRORS * self.error

    def __str__(self) -> str:
        return (
            f"is no better than guessing, which scores {number(self.score)} with a standard error of "
            f"{number(self.error)}"
        )


class _Suspicions:
    """What a number would have to be to be suspected: looked up once for a task of a model, not for every cell."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: dict[tuple[str, str, str], _TooHigh | _Guessed | None] = {}
        self._vocabularies: dict[str, int | None] = {}  # by model

    def of(self, result: CellResult, task: str, metric: str) -> _TooHigh | _Guessed | None:
        key = result.cell.model, task, metric
        if key not in self._known:
            self._known[key] = self._found(result, task, metric)
        return self._known[key]

    def _found(self, result: CellResult, task: str, metric: str) -> _TooHigh | _Guessed | None:
        if metric == _PER_TOKEN:
            size = self._vocabulary(result)
            return None if size is None else _TooHigh(size)
        name = metric.rpartition("/")[2]
        guesses = next(self._manifests(result, [task]), {}).get("guessing", {})
        if metric not in guesses or (metric != name and name in guesses):  # a member of a group that is told itself
            return None
        return _Guessed(*guesses[metric])

    def _vocabulary(self, result: CellResult) -> int | None:
        """From the first cell of the model, and of its tasks, that says it."""
        model = result.cell.model
        if model not in self._vocabularies:
            said = (
                manifest["vocabulary"] for manifest in self._manifests(result, result.tasks) if "vocabulary" in manifest
            )
            self._vocabularies[model] = next(map(int, said), None)
        return self._vocabularies[model]

    def _manifests(self, result: CellResult, tasks: Iterable[str]) -> Iterator[dict[str, Any]]:
        folder = RunFolder(self._run).cell(result.cell.id).tasks
        for task in tasks:
            if summary := read_summary(folder, task):
                yield summary["manifest"]
