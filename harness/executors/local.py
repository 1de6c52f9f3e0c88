"""Cells as children of this process, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence

from harness import memory
from harness.cells import Cell
from harness.endings import Happening
from harness.executors import MakeReady
from harness.executors.depot import fetch_missing
from harness.limits import Limits
from harness.pool import Command, Pool
from harness.runfolder import CellFolder, RunFolder
from harness.supervisor import worker_environment


class LocalExecutor:
    """``jobs`` cells at a time. Needs nothing."""

    tries = 1

    def __init__(self, folder: RunFolder, limits: Limits) -> None:
        self._folder, self._limits = folder, limits
        self._pool = Pool(limits)

    @property
    def interrupted_by(self) -> int | None:
        return self._pool.interrupted_by

    def run(self, cells: Sequence[Cell], make_ready: MakeReady) -> Generator[tuple[str, Happening], None, None]:
        """See :class:`harness.executors.Executor`."""
        placements = memory.place(cells, self._limits)
        for command, happening in self._pool.run(self._commands(cells, placements, make_ready)):
            yield command.name, happening

    def _commands(
        self, cells: Sequence[Cell], placements: Mapping[str, str], make_ready: MakeReady
    ) -> Iterator[Command]:
        for cell in cells:
            folder = make_ready(cell, placements[cell.id])
            fetch_missing(folder)  # of a run that was begun on a cluster
            yield worker_command(self._folder, folder, self._limits)


def worker_command(run: RunFolder, cell: CellFolder, limits: Limits) -> Command:
    """What computes the cell of a folder; its parent has to be this process."""
    words = (sys.executable, "-P", "-m", "harness.worker", str(cell.path))
    return Command(cell.path.name, words, worker_environment(run, limits), cell.log.resolve())
