"""Cells on the machines of a Ray cluster: placed by the processors, GPUs and memory that they need.

Ray finds a machine and says when one is lost; what a cell does there is :mod:`harness.executors.node`, and how it ended
is told in this harness's own words: Ray itself retries nothing.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from harness import memory
from harness.cells import Cell
from harness.endings import Ending, Happening, Lost
from harness.errors import HarnessError, Infrastructure, Problems
from harness.executors import MakeReady, node
from harness.executors.depot import Depot, Digests, enlist, fetch_missing, inside, is_heavy, left_files, listed, sha256
from harness.executors.resources import Resources, machines
from harness.limits import Limits
from harness.runfolder import CellFolder, RunFolder

_GLANCE_SECONDS = 0.2  # between looks at signals while no machine says anything
_HURRY_SECONDS = 1.0  # what a second signal leaves to cells that do not end at once
_MACHINES_SECONDS = 600.0  # for lost machines to be replaced when none is left that a cell fits on
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Running:
    cell: Cell
    folder: CellFolder
    need: Resources
    started: float = field(default_factory=time.monotonic)
    fault: str | None = None  # why what the machine left cannot be had

    def lost(self, why: str) -> Lost:
        return Lost(why, time.monotonic() - self.started)


class RayExecutor:
    """As many cells at a time as fit on the cluster, or ``jobs``.

    ``address`` is that of the cluster (Ray's own default without one: ``RAY_ADDRESS``, a cluster on this machine, or
    one is started). ``artifacts`` is an fsspec URL for machines that do not see the run folder.
    """

    tries = 2

    def __init__(
        self, folder: RunFolder, limits: Limits, *, address: str | None, artifacts: str | None, jobs: int | None
    ) -> None:
        self._folder, self._limits, self._address, self._jobs = folder, replace(limits, jobs=1), address, jobs
        self._depot = Depot(artifacts) if artifacts else None
        self._libraries = node.libraries()
        self._running: dict[Any, _Running] = {}  # by the stream of what happens
        self._calibrations: dict[str, Any] = {}
        self._signals: list[int] = []

    @property
    def interrupted_by(self) -> int | None:
        return self._signals[0] if self._signals else None

    def run(self, cells: Sequence[Cell], make_ready: MakeReady) -> Generator[tuple[str, Happening | Lost], None, None]:
        """See :class:`harness.executors.Executor`."""
        with self._signals_noticed():
            _connect(self._address)
            placements, needs = self._placed(cells)
            waiting, passed_on = deque(cells), 0
            alone_since = leave_at = None
            try:
                while (waiting and not self._signals) or self._running:
                    while waiting and not self._signals and self._has_room(needs[waiting[0].id]):
                        cell = waiting.popleft()
                        self._start(cell, make_ready(cell, placements[cell.id]), needs[cell.id])
                    if self._running:
                        alone_since = None
                        yield from self._next_happening()
                    else:
                        alone_since = alone_since or time.monotonic()
                        _wait_for_machines(alone_since, needs[waiting[0].id])
                    while passed_on < len(self._signals):
                        passed_on += 1
                        self._cancel(force=passed_on > 1)
                        leave_at = time.monotonic() + _HURRY_SECONDS if passed_on > 1 else None
                    if leave_at is not None and time.monotonic() >= leave_at:
                        return
            finally:
                self._cancel(force=True)
                self._running.clear()

    def _placed(self, cells: Sequence[Cell]) -> tuple[Mapping[str, str], dict[str, Resources]]:
        """How much of its model each cell holds, and what it needs of a machine. Raises Problems where none has it."""
        there = machines()
        budget = self._limits.memory_bytes or int(max(machine.has.memory_bytes for machine in there))
        problems, needs, possible = [], {}, {cell.id: memory.possible(cell) for cell in cells}
        for cell in cells:
            fitting = [size for size in possible[cell.id].values() if size <= budget]
            size = self._limits.memory_bytes or (fitting[0] if fitting else min(possible[cell.id].values()))
            needs[cell.id] = Resources(self._limits.threads, int(cell.device == "cuda"), size)
            if not any(machine.has.holds(needs[cell.id]) for machine in there):
                problems.append(
                    HarnessError(
                        f"{cell.model}, {cell.label}, {cell.setting} needs {needs[cell.id]}, and no machine has that: "
                        + "; ".join(map(str, there[:5])),
                        fix="larger machines, --threads, --memory, or --device",
                    )
                )
        if problems:
            raise Problems(problems)
        return memory.place(cells, replace(self._limits, memory_bytes=budget)), needs

    def _has_room(self, need: Resources) -> bool:
        """Whether another cell fits now, as far as this run's own cells are concerned."""
        if self._jobs is not None and len(self._running) >= self._jobs:
            return False
        there = machines()
        whole = sum((machine.has for machine in there), Resources())
        taken = sum((running.need for running in self._running.values()), Resources())
        return any(machine.has.holds(need) for machine in there) and whole.holds(taken + need)

    def _start(self, cell: Cell, folder: CellFolder, need: Resources) -> None:
        assignment = node.Assignment(
            asked=folder.cell.read_bytes(),
            run=self._folder.path.resolve(),
            limits=self._limits,
            libraries=self._libraries,
            depot=self._depot,
            uploaded=self._uploaded(folder),
        )
        task = ray.remote(node.compute).options(
            num_cpus=need.processors, num_gpus=need.gpus, memory=need.memory_bytes, max_retries=0,
            scheduling_strategy="SPREAD", name=f"{cell.model} {cell.setting} {cell.label}",
        )  # fmt: skip
        self._running[task.remote(assignment, self._calibration(cell))] = _Running(cell, folder, need)

    def _uploaded(self, folder: CellFolder) -> Digests:
        """What a machine without the run folder finds at the depot, after a run elsewhere was brought there."""
        if self._depot is None:
            return {}
        url, _ = listed(folder)
        if url != self._depot.url and folder.quantized_report.is_file():
            fetch_missing(folder)
            enlist(folder, self._depot, self._depot.put(folder, left_files(folder)))
        return listed(folder)[1]

    def _calibration(self, cell: Cell) -> Any:
        """The calibration tokens of a cell, sent to each machine once."""
        digest = cell.calibration_sha256
        if self._depot is None or digest is None:
            return None
        if digest not in self._calibrations:
            self._calibrations[digest] = ray.put(self._folder.calibration(digest).read_bytes())
        return self._calibrations[digest]

    def _next_happening(self) -> Iterator[tuple[str, Happening | Lost]]:
        streams, _ = ray.wait(list(self._running), timeout=_GLANCE_SECONDS)
        for stream in streams:
            running = self._running[stream]
            happening = self._received(stream, running)
            if isinstance(happening, Ending | Lost):
                del self._running[stream]
                yield running.cell.id, running.lost(running.fault) if running.fault else happening
            elif happening["event"] == "left":
                self._bring_home(running, happening["files"])
            else:
                yield running.cell.id, happening

    def _received(self, stream: Any, running: _Running) -> Happening | Lost:
        try:
            happening: Happening | Lost = ray.get(next(stream))
        except (StopIteration, ray.exceptions.TaskCancelledError):
            if not self._signals:
                return running.lost("the cell's Ray worker left without a word")
            return Ending(-signal.SIGTERM, "interrupt", False, None, time.monotonic() - running.started)
        except ray.exceptions.RayError as error:
            return running.lost(f"lost by Ray: {_summary(error)}")
        if isinstance(happening, Ending) and happening.stopped == "interrupt" and not self._signals:
            return running.lost("the cell's Ray worker was told to stop, not by this run")
        return happening

    def _bring_home(self, running: _Running, files: Digests) -> None:
        """Have in the cell's folder what a machine left there or at the depot; what cannot be had is a fault."""
        try:
            if self._depot is None:
                _await_files(running.folder, files)
            else:
                light = {name: digest for name, digest in files.items() if not is_heavy(name, running.folder)}
                self._depot.get(running.folder, light)
                enlist(running.folder, self._depot, files)
        except (Infrastructure, OSError) as error:
            running.fault = f"what the machine left cannot be had: {error}"

    def _cancel(self, *, force: bool) -> None:
        """Ask the cells to end as Ctrl-C asks children; with ``force``, their machines kill them."""
        for stream in self._running:
            ray.cancel(stream, force=force, recursive=False)

    @contextmanager
    def _signals_noticed(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self._notice) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _notice(self, number: int, frame: object) -> None:
        self._signals.append(number)


def _connect(address: str | None) -> None:
    """Join the cluster. The connection stays for as long as this process. Raises HarnessError where there is none."""
    if ray.is_initialized():
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise HarnessError(
            f"cannot join the Ray cluster: {_summary(error)}", where=address, fix="ray status; docs/clusters.md"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray takes SIGTERM for itself
            signal.signal(number, handler)


def _wait_for_machines(since: float, need: Resources) -> None:
    """A moment's sleep. Raises Infrastructure when for long no machine was there that a cell fits on."""
    if time.monotonic() > since + _MACHINES_SECONDS:
        raise Infrastructure(
            f"no machine is left with {need}: {'; '.join(map(str, machines())) or 'none at all'}",
            fix="start machines, then run the same command: what is recorded is kept",
        )
    time.sleep(_GLANCE_SECONDS)


def _await_files(folder: CellFolder, files: Digests, patience_seconds: float = 60.0) -> None:
    """Wait until files of a shared folder are seen here too. Raises Infrastructure when they are not."""
    give_up = time.monotonic() + patience_seconds
    for name, digest in files.items():
        path = inside(folder, name)
        while not path.is_file() or sha256(path) != digest:
            if time.monotonic() > give_up:
                raise Infrastructure(f"{name} is not what the machine wrote", where=str(path))
            time.sleep(_GLANCE_SECONDS)


def _summary(error: BaseException) -> str:
    """One line of what Ray says at length."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
