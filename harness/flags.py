"""What is wrong with a number though it is one: told beside every table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.results import CellResult
from harness.runfolder import RunFolder
from harness.tables import number
from harness.tasks.result_files import read_summary

_PER_TOKEN = "token_perplexity"
_ACCURACIES = ("acc", "acc_norm")
_STANDARD_ERRORS = 2  # above what guessing scores, up to which a score may well be a guesser's


def no_better_than_guessing(results: Sequence[CellResult], run: Path) -> list[str]:
    """A line for each perplexity above the vocabulary's size, where every token equally likely would score better, and
    for each accuracy that drawing answers at random may well reach.
    """
    manifests = _Manifests(run)
    return [
        f"{result.cell.model} {result.cell.setting} {result.cell.label}: {line}"
        for result in results
        for task, rows in result.tasks.items()
        for row in rows
        for line in _told(task, row.metric, row.value, manifests, result)
    ]


def _told(task: str, metric: str, value: float, manifests: _Manifests, result: CellResult) -> Iterator[str]:
    if metric == _PER_TOKEN:
        size = manifests.vocabulary(result)
        if size is not None and value > size:
            yield (
                f"{task} perplexity {number(value)} is above the {size} tokens of the vocabulary: worse than guessing"
            )
    elif (name := metric.rpartition("/")[2]) in _ACCURACIES:
        guesses = manifests.guessing(task, result)
        score, error = guesses.get(metric, (None, 0.0))
        if metric != name and name in guesses:  # a member of a group that is told itself
            return
        if score is not None and value <= score + _STANDARD_ERRORS * error:
            yield (
                f"{task} {metric} {number(value)} is no better than guessing, which scores {number(score)} "
                f"with a standard error of {number(error)}"
            )


class _Manifests:
    """What tasks say of how they measured. Not every cell's files are opened: that would take long in a large run."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._vocabularies: dict[str, int | None] = {}  # by model
        self._guesses: dict[str, Mapping[str, Sequence[float]]] = {}  # by task: its documents are those of every cell

    def vocabulary(self, result: CellResult) -> int | None:
        """From the first cell of the model, and of its tasks, that says it."""
        model = result.cell.model
        if model not in self._vocabularies:
            sizes = (manifest["vocabulary"] for manifest in self._of(result, result.tasks) if "vocabulary" in manifest)
            self._vocabularies[model] = next(map(int, sizes), None)
        return self._vocabularies[model]

    def guessing(self, task: str, result: CellResult) -> Mapping[str, Sequence[float]]:
        """(score, standard error) of a guesser by metric."""
        if task not in self._guesses:
            self._guesses[task] = next(self._of(result, [task]), {}).get("guessing", {})
        return self._guesses[task]

    def _of(self, result: CellResult, tasks: Sequence[str] | Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        folder = RunFolder(self._run).cell(result.cell.id).tasks
        for task in tasks:
            if summary := read_summary(folder, task):
                yield summary["manifest"]
