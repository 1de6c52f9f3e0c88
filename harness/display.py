"""How a run shows itself on stderr: a line per running cell on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness.supervisor import Watcher

_GOOD = ("ok", "unsupported")


class PlainWatcher:
    """A line when a cell starts and when it ends. A reader who leaves (``| head``) does not stop the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._ended = self._due = 0

    def due(self, cells: int) -> None:
        self._due += cells

    def started(self, name: str, title: str) -> None:
        self._say(f"start {title}")

    def progress(self, name: str, stage: str, done: int, total: int, detail: str) -> None:
        """Nothing: a log of bars helps nobody."""

    def ended(self, name: str, title: str, status: str, reason: str | None, seconds: float) -> None:
        self._ended += self._due > 0
        count = f"[{self._ended}/{self._due}] " if self._due else ""
        self._say(f"{count}{status} {title} ({seconds:.1f} s)" + (f": {reason}" if reason else ""))

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._stream, flush=True)


class LiveWatcher:
    """A bar for the whole and one per running cell, with its stage; a line above for each that ended."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._whole: TaskID | None = None
        self._due = 0

    def due(self, cells: int) -> None:
        self._due += cells
        if self._whole is None:
            self._whole = self._progress.add_task("all cells", stage="", detail="")
        self._progress.update(self._whole, total=self._due)

    def started(self, name: str, title: str) -> None:
        self._bars[name] = self._progress.add_task(escape(title), total=None, stage="start", detail="")

    def progress(self, name: str, stage: str, done: int, total: int, detail: str) -> None:
        self._progress.update(
            self._bars[name], completed=done, total=total or None, stage=escape(stage), detail=escape(detail[-40:])
        )

    def ended(self, name: str, title: str, status: str, reason: str | None, seconds: float) -> None:
        self._progress.remove_task(self._bars.pop(name))
        if self._whole is not None:
            self._progress.advance(self._whole)
        colour = "green" if status in _GOOD else "red"
        why = f": {escape(reason)}" if reason else ""
        self._progress.console.print(f"[{colour}]{status}[/] {escape(title)} [dim]{seconds:.1f} s[/]{why}")


@contextlib.contextmanager
def watching() -> Iterator[Watcher]:
    """The watcher that suits stderr."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield PlainWatcher(sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"), TextColumn("[cyan]{task.fields[stage]}"), BarColumn(bar_width=24),
        MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.fields[detail]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        yield LiveWatcher(progress)
