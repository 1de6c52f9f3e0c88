"""Run the cells of a plan: one child process a cell, every end told by its name, every result recorded once.

This process imports nothing heavy and alone writes the store. All state is in the run folder: whatever is killed
whenever, the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import harness
from harness import artifacts, atomic, environment, processes
from harness.cells import Cell
from harness.endings import Ending, Lost, classify, resumes
from harness.errors import BadOutput, Infrastructure
from harness.executors import Executor
from harness.limits import Limits, processors
from harness.pool import MARK
from harness.runfolder import CellFolder, Claim, RunFolder
from harness.store import Attempt, Contents, Damaged, Run, Store, read, set_aside


class Watcher(Protocol):
    """Who wants to see how a run goes on."""

    def due(self, cells: int) -> None: ...

    def started(self, name: str, title: str) -> None: ...

    def progress(self, name: str, stage: str, done: int, total: int, detail: str) -> None: ...

    def ended(self, name: str, title: str, status: str, reason: str | None, seconds: float) -> None: ...


class Supervisor:
    """Runs what is due of the cells ``asked`` for, of all the ``cells`` of a claimed folder, with ``threads`` each."""

    def __init__(
        self, claim: Claim, cells: Sequence[Cell], asked: Sequence[Cell], executor: Executor, threads: int,
        watcher: Watcher, start: Callable[[], Run], retry: bool,
    ) -> None:  # fmt: skip
        self._claim, self._folder, self._cells, self._asked = claim, claim.folder, cells, asked
        self._executor, self._threads, self._watcher = executor, threads, watcher
        self._start, self._retry = start, retry
        self._by_id = {cell.id: cell for cell in asked}
        contents = _recorded(self._folder.store)
        self._last: dict[str, Attempt] = {row.cell: row for row in contents.attempts}
        self._measured = {(row.cell, row.task) for row in contents.measured}
        self._faults: dict[str, BadOutput] = {}  # of cells whose files are not what a worker writes
        self._said: dict[str, dict[str, Any]] = {}  # last words of workers that could not write them down
        self._recording: Store | None = None

    def run(self) -> int | None:
        """Run what is due; a finished run is left untouched. Returns the signal that stopped it, if one did.

        Raises Infrastructure when the machine fails (disk full, folder gone); what is recorded stays.
        """
        try:
            self._clean_up()
            for cell in self._cells:
                self._recover(cell)
            return self._run_due()
        except OSError as error:
            raise Infrastructure(
                f"the run folder cannot be used: {error.strerror or error}",
                where=str(error.filename or self._folder.path),
                fix="make room or make it writable, then run the same command: what is recorded is kept",
            ) from error
        finally:
            if self._recording is not None:
                self._recording.close()

    @property
    def _store(self) -> Store:
        """Opened for writing when there is something to write: a finished run's files stay as they are."""
        self._claim.check()
        if self._recording is None:
            self._recording = Store(self._folder.store)
            self._recording.begin(self._start())
        return self._recording

    def _clean_up(self) -> None:
        """End what an earlier supervisor of this folder left running, and remove half-written files."""
        processes.end_all(lambda: processes.marked(f"{MARK}={self._folder.path.resolve()}"))
        atomic.sweep(self._folder.path)

    def _recover(self, cell: Cell) -> None:
        """Record what a worker finished and the supervisor did not get to record, or the store has lost."""
        folder, last = self._folder.cell(cell.id), self._last.get(cell.id)
        try:
            self._record_tasks(cell)
            said = artifacts.result(folder)
            if said is not None and (last is None or last.attempt < said["attempt"]):
                about = artifacts.quantized(folder)
                self._record_end(cell, said["status"], said["reason"], 0, said, about, None, number=said["attempt"])
        except BadOutput:  # not what a worker writes: the cell counts as not ended, runs again, and will tell
            return

    def _run_due(self) -> int | None:
        """Run the cells that are due; those whose machine failed once more, where there are other machines."""
        due = [cell for cell in self._asked if self._is_due(cell)]
        for tries_left in reversed(range(self._executor.tries)):
            if not due:
                break
            self._watcher.due(len(due))
            failed = self._run_once(due)
            if self._executor.interrupted_by is not None:
                break
            due = failed if tries_left else []
        return self._executor.interrupted_by

    def _run_once(self, due: Sequence[Cell]) -> list[Cell]:
        """Run cells. Returns those whose machine failed; raises Infrastructure at the first if it is the only one."""
        failed = []
        with contextlib.closing(self._executor.run(due, self._make_ready)) as happenings:
            for name, happening in happenings:
                cell = self._by_id[name]
                if not isinstance(happening, Ending | Lost):
                    self._heard(cell, happening)
                elif self._conclude(cell, happening) == "infra":
                    failed.append(cell)
                    if self._executor.tries == 1:
                        raise Infrastructure(
                            f"the machine failed in {_title(cell)}: {self._last[cell.id].reason}",
                            where=str(self._folder.path),
                            fix="mend it, then run the same command: what is recorded is kept",
                        )
        return failed

    def _make_ready(self, cell: Cell, placement: str) -> CellFolder:
        """A cell's turn has come: its folder tells the worker what to do, and how much of the model to hold."""
        self._claim.check()
        folder = self._folder.cell(cell.id)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.end.unlink(missing_ok=True)
        attempt = self._attempts(cell) + 1
        asked = {"cell": cell.to_json(), "attempt": attempt, "threads": self._threads, "placement": placement}
        atomic.write_json(folder.cell, asked)
        self._watcher.started(cell.id, _title(cell))
        return folder

    def _is_due(self, cell: Cell) -> bool:
        last = self._last.get(cell.id)
        if last is None:
            return True
        if last.status == "ok":  # a later command may ask for more tasks
            return any((cell.id, task) not in self._measured for task in cell.tasks)
        return last.status != "unsupported" and (self._retry or resumes(last.status, last.returncode))

    def _heard(self, cell: Cell, event: Mapping[str, Any]) -> None:
        """What a worker says. A method can write to the pipe too: anything else is passed over."""
        self._claim.check()
        match event:
            case {
                "event": "progress",
                "stage": str(stage),
                "done": int(done),
                "total": int(total),
                "detail": str(detail),
            }:
                self._watcher.progress(cell.id, stage, done, total, detail)
            case {"event": "measured"}:
                try:
                    self._record_tasks(cell)
                except BadOutput as error:
                    self._faults[cell.id] = error
            case {"event": "end"}:
                self._said[cell.id] = dict(event)

    def _conclude(self, cell: Cell, ending: Ending | Lost) -> str:
        """Name the end of a cell and record it with all that the worker left."""
        folder = self._folder.cell(cell.id)
        returncode, peak_bytes = (None, None) if isinstance(ending, Lost) else (ending.returncode, ending.peak_bytes)
        try:
            self._record_tasks(cell)
            if cell.id in self._faults:
                raise self._faults.pop(cell.id)
            said = artifacts.result(folder)
            if said is None and cell.id in self._said:
                said = artifacts.checked_end(self._said.pop(cell.id))
            status, reason = classify(ending, said)
            about = artifacts.quantized(folder)
            self._record_end(cell, status, reason, returncode, said or {}, about, peak_bytes)
        except BadOutput as error:
            status, reason = "bad_output", error.what
            self._record_end(cell, status, reason, returncode, {}, {}, peak_bytes)
        self._watcher.ended(cell.id, _title(cell), status, reason, ending.seconds)
        return status

    def _record_tasks(self, cell: Cell) -> None:
        """Record the tasks whose files are there and whose rows are not: a task's file is what makes it final."""
        for task in cell.tasks:
            if (cell.id, task) in self._measured:
                continue
            if rows := artifacts.measured(cell.id, self._folder.cell(cell.id), task):
                self._store.add_measured(rows)
                self._measured.add((cell.id, task))

    def _record_end(
        self, cell: Cell, status: str, reason: str | None, returncode: int | None, said: Mapping[str, Any],
        about: Mapping[str, Any], peak_bytes: int | None, *, number: int | None = None,
    ) -> None:  # fmt: skip
        row = artifacts.attempt(
            cell.id, number or self._attempts(cell) + 1, self._store.run, status=status, reason=reason,
            returncode=returncode, said=said, quantized=about, peak_bytes=peak_bytes,
        )  # fmt: skip
        self._store.add_attempt(row)
        self._last[cell.id] = row

    def _attempts(self, cell: Cell) -> int:
        return self._last[cell.id].attempt if cell.id in self._last else 0


def _recorded(store: Path) -> Contents:
    """What the store holds. A damaged one is set aside: what the cells' folders hold is then recorded again."""
    if not store.exists():
        return Contents([], [], [])
    try:
        return read(store, "rw")
    except Damaged as error:
        kept = set_aside(store)
        print(f"warning: {error.what}; kept as {kept.name}, read again from cells/", file=sys.stderr)
        return Contents([], [], [])


def worker_environment(folder: RunFolder, limits: Limits) -> dict[str, str]:
    """What a worker sees of the environment: what is on the list, and no network."""
    threads = {name: str(limits.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # With more threads than processors, waiting threads must sleep, or they take the processor from those at work.
    waiting = {"OMP_WAIT_POLICY": "passive"} if limits.jobs * limits.threads > processors() else {}
    return environment.allowed() | threads | waiting | child_environment(folder) | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may sum in another order each time
    }  # fmt: skip


def child_environment(folder: RunFolder) -> dict[str, str]:
    """What every child is told: whose it is, and where this very harness lies, installed or not."""
    here = str(Path(harness.__file__).resolve().parents[1])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {MARK: str(folder.path.resolve()), "HARNESS_SUPERVISOR": str(os.getpid()), "PYTHONPATH": path}


def _title(cell: Cell) -> str:
    return f"{cell.model} {cell.setting} {cell.label}"
