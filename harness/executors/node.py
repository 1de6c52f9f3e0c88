"""What a machine of a cluster does with a cell: the same child process, with the same limits, as on one machine.

Nothing here knows Ray: :func:`compute` is a generator of what happens. The machine has to have this harness with the
same libraries, the model, and the data, at the same paths as the machine that runs ``harness run``. The run folder is
either there too (a shared disk), or the cell's files come from and go to a :class:`harness.executors.depot.Depot`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from harness import __version__, atomic, processes, provenance
from harness.cells import Cell
from harness.checkpoint import open_checkpoint
from harness.endings import Ending, Event, Happening, Lost
from harness.errors import HarnessError, Infrastructure
from harness.executors.depot import Depot, Digests, left_files, sha256
from harness.executors.local import worker_command
from harness.limits import Limits
from harness.paths import cache_dir
from harness.pool import Pool
from harness.registry import is_path
from harness.runfolder import CellFolder, RunFolder

_PROGRESS_SECONDS = 1.0  # between two reports of progress that cross the network


@dataclass(frozen=True)
class Assignment:
    """All that a machine is told of a cell."""

    asked: bytes  # what lies in the cell's cell.json
    run: Path  # the run folder
    limits: Limits
    libraries: Mapping[str, str | None]
    depot: Depot | None  # None: the run folder is on a shared disk
    uploaded: Digests = field(default_factory=dict)  # by earlier attempts and commands

    @property
    def cell(self) -> Cell:
        return Cell.from_json(json.loads(self.asked)["cell"])


def compute(assignment: Assignment, calibration: bytes | None) -> Iterator[Happening | Lost]:
    """Run a cell's worker. Yields what it says, ``{"event": "left", "files": …}`` for files to be fetched, its end.

    ``calibration`` is the file that the run folder has under the cell's ``calibration_sha256``, for a machine without
    the run folder. What the machine itself lacks or breaks is told as Lost.
    """
    start, host = time.monotonic(), socket.gethostname()
    yield _stage(f"on {host}")
    try:
        _check(assignment)
        run = _run_folder(assignment)
        folder = run.cell(assignment.cell.id)
        if assignment.depot is not None:
            _furnish(assignment, run, calibration)
        processes.end_all(lambda: processes.marked(f"HARNESS_LOG={folder.log.resolve()}"))  # a lost attempt's
        yield from _run(assignment, run, folder)
        if assignment.depot is not None and folder.end.is_file():
            shutil.rmtree(folder.path)  # all of it is at the depot
    except HarnessError as error:
        yield Lost(f"{host}: {error.what}" + (f" ({error.where})" if error.where else ""), time.monotonic() - start)
    except OSError as error:
        yield Lost(f"{host}: {error}", time.monotonic() - start)


def libraries() -> dict[str, str | None]:
    """Versions that have to be the same everywhere for a cell to have the same integers everywhere.

    What a version says of the device that it was built for (``+cpu``) is left out: the machine that only starts the run
    may well have none.
    """
    versions = {name: provenance.version(name) for name in provenance.PACKAGES}
    versions |= {"harness": __version__, "python": platform.python_version()}
    return {name: version and version.partition("+")[0] for name, version in versions.items()}


def _run(assignment: Assignment, run: RunFolder, folder: CellFolder) -> Iterator[Happening]:
    said, known = 0.0, set(assignment.uploaded)
    pool = Pool(assignment.limits)
    with closing(pool.run([worker_command(run, folder, assignment.limits)])) as happenings:
        for _, happening in happenings:
            match happening:
                case Ending():
                    yield _left(assignment, folder, known - {folder.log.name, folder.end.name})
                case {"event": "measured"}:
                    yield _left(assignment, folder, known)
                case {"event": "progress", "done": int(done), "total": int(total)} if done < total:
                    now = time.monotonic()
                    if now < said + _PROGRESS_SECONDS:
                        continue
                    said = now
            yield happening


def _check(assignment: Assignment) -> None:
    """Raises Infrastructure for what this machine has not, or has otherwise than the one that planned the cell."""
    cell, here = assignment.cell, libraries()
    others = [
        f"{name} {here[name] or 'missing'}, not {version}"
        for name, version in assignment.libraries.items()
        if here[name] != version
    ]
    if others:
        raise Infrastructure(f"other libraries: {'; '.join(others)}", fix="install the same everywhere")
    places = {"model": cell.model_path, "data root": cell.data_root}
    if is_path(cell.method_source):
        places["method"] = cell.method_source
    for what, place in places.items():
        if place is not None and not Path(place).exists():
            raise Infrastructure(f"the {what} is not on this machine", where=place, fix="copy it there, or mount it")
    if open_checkpoint(Path(cell.model_path)).sha256() != cell.weights_sha256:
        raise Infrastructure("the model has other weights on this machine", where=cell.model_path)


def _run_folder(assignment: Assignment) -> RunFolder:
    """The run folder: the shared one, or one of this machine's own. Raises Infrastructure where it is not shared."""
    if assignment.depot is not None:
        return RunFolder(cache_dir() / "nodes" / f"{assignment.run.name}-{os.getuid()}")
    shared = RunFolder(assignment.run)
    cell = shared.cell(assignment.cell.id).cell
    if not cell.is_file() or cell.read_bytes() != assignment.asked:
        raise Infrastructure(
            "the run folder is not shared with this machine", where=str(shared.path), fix="mount it, or --artifacts URL"
        )
    return shared


def _furnish(assignment: Assignment, run: RunFolder, calibration: bytes | None) -> None:
    """Put into a folder of this machine what the worker reads there."""
    assert assignment.depot is not None
    folder, digest = run.cell(assignment.cell.id), assignment.cell.calibration_sha256
    if digest is not None and calibration is not None and not run.calibration(digest).is_file():
        atomic.write_bytes(run.calibration(digest), calibration)
    atomic.write_bytes(folder.cell, assignment.asked)
    folder.end.unlink(missing_ok=True)
    earlier = {name: digest for name, digest in assignment.uploaded.items() if name != folder.end.name}
    assignment.depot.get(folder, earlier)


def _left(assignment: Assignment, folder: CellFolder, known: set[str]) -> Event:
    """Upload what a worker left and is not ``known`` yet, where nobody else sees it; tell its digests.

    A worker writes a file once and whole; only its log, and the end that closes an attempt, change.
    """
    new = [name for name in left_files(folder) if name not in known]
    known |= set(new)
    if assignment.depot is not None:
        return {"event": "left", "files": assignment.depot.put(folder, new)}
    small = [name for name in new if name.endswith(".json")]
    return {"event": "left", "files": {name: sha256(folder.path / name) for name in small}}


def _stage(detail: str) -> Event:
    return {"event": "progress", "stage": "start", "done": 0, "total": 1, "detail": detail}
