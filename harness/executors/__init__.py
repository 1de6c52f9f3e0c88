"""Where cells are computed: on this machine (:mod:`.local`), or on those of a cluster (:mod:`.cluster`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from harness.cells import Cell
from harness.endings import Happening, Lost
from harness.runfolder import CellFolder

MakeReady = Callable[[Cell, str], CellFolder]
"""A cell's turn has come, at one of :data:`harness.memory.PLACEMENTS`: writes down in its folder what is to be done."""


class Executor(Protocol):
    """Computes cells, each in a process of its own that runs :mod:`harness.worker`, and never writes the store."""

    tries: int
    """How often a cell is run whose machine fails. 1: there is only this machine, so its failure ends the run."""

    @property
    def interrupted_by(self) -> int | None:
        """The first signal that asked to stop, if one did."""

    def run(self, cells: Sequence[Cell], make_ready: MakeReady) -> Generator[tuple[str, Happening | Lost], None, None]:
        """Compute cells; yield, with a cell's id, what its process says, and last how it ended.

        When an end is yielded, what the worker left lies in the cell's folder. Whoever stops iterating early stops the
        cells. Raises HarnessError, before anything is computed, for cells that fit nowhere.
        """
