"""Runs a scenario once for every write it makes, and has that write fail: ``LD_PRELOAD=shim.so python boundaries.py``.

Each try is a fork of this process, in a folder of its own. Afterwards the same scenario runs undisturbed, and must end
as if nothing had happened. Prints one JSON object: how many writes there were, and what went wrong.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness import atomic, store
from harness.errors import Infrastructure
from harness.executors.local import LocalExecutor
from harness.limits import Limits
from harness.runfolder import RunFolder
from harness.store import Attempt, Measured, Run, Store
from harness.supervisor import Supervisor

HOW = {"kill": -1, "tear": -2, "full": errno.ENOSPC, "broken": errno.EIO}
TOLD = 7  # the exit code of a process that said what was wrong
WHEN = "2026-01-01T00:00:00+00:00"
TASKS = ["one", "two"]
CELL = "0123456789abcdef"


class Scenario(NamedTuple):
    """``work`` may be killed anywhere; ``seen`` is what there is afterwards, as text; None: nothing yet."""

    work: Callable[[Path, Callable[[str], None]], None]
    seen: Callable[[Path], list[str]]


def record(folder: Path, acknowledge: Callable[[str], None]) -> None:
    """The store alone: rows that are not there yet are added, each acknowledged when it is committed."""
    path = folder / "run.sqlite"
    there = store.read(path, "rw") if path.exists() else store.Contents([], [], [])
    recording = Store(path)
    if not there.runs:
        recording.begin(Run(WHEN, "{}", "{}"))
        acknowledge("begun")
    for task in TASKS:
        if task not in {row.task for row in there.measured}:
            recording.add_measured([Measured(CELL, task, f"m{n}", 1.5, None, 1, 1, 0.5, WHEN) for n in range(2)])
            acknowledge(task)
    if not there.attempts:
        recording.add_attempt(Attempt(CELL, 1, 1, "ok", None, 0, 1.0, 1.0, 1.0, 1, 4.0, 1, WHEN))
        acknowledge("ended")
    recording.close()


def recorded(folder: Path) -> list[str]:
    path = folder / "run.sqlite"
    if not path.exists():
        return []
    found = store.read(path, "rw")
    assert len(found.measured) == 2 * len({row.task for row in found.measured}), "half a task"
    return (
        ["begun"] * len(found.runs)
        + list(dict.fromkeys(r.task for r in found.measured))
        + ["ended"] * len(found.attempts)
    )


def supervise(folder: Path, acknowledge: Callable[[str], None]) -> None:
    """A supervisor that finds cells which have ended and a store that does not know: it records them all."""
    from harness.planfile import read_plan

    run = RunFolder(folder)
    plan = read_plan(run.plan)
    assert plan is not None
    with run.claimed() as claim:
        start = lambda: Run(WHEN, "{}", "{}")  # noqa: E731
        Supervisor(claim, plan.cells, plan.cells, LocalExecutor(run, Limits()), 1, Nobody(), start, False).run()


def supervised(folder: Path) -> list[str]:
    from harness import results

    found = results.load(folder)
    return [
        json.dumps([row["cell"], row["task"], row["value"], row["status"]]) for row in results.measurement_rows(found)
    ]


class Nobody:
    """Watches, and expects that no cell is started."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None

    def started(self, name: str, title: str) -> None:
        raise AssertionError(f"{title} was run again")


def write(folder: Path, acknowledge: Callable[[str], None]) -> None:
    """What a worker does with a result."""
    for task in TASKS:
        if not (folder / f"{task}.json").exists():
            atomic.write_bytes(folder / f"{task}.safetensors", task.encode() * 1000)
            atomic.write_json(folder / f"{task}.json", {"task": task})
            acknowledge(task)


def written(folder: Path) -> list[str]:
    found = []
    for task in TASKS:
        if (folder / f"{task}.json").exists():
            assert (folder / f"{task}.safetensors").read_bytes() == task.encode() * 1000
            assert json.loads((folder / f"{task}.json").read_text()) == {"task": task}
            found.append(task)
    return found


SCENARIOS = {
    "store": Scenario(record, recorded),
    "supervisor": Scenario(supervise, supervised),
    "worker": Scenario(write, written),
}


def attempted(scenario: Scenario, folder: Path, nth: int, how: int, shim: Any) -> tuple[int, list[str]]:
    """Fork, arm, work. Returns the exit status and what was acknowledged before the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            shim.shim_arm(str(folder).encode(), nth, how)
            scenario.work(folder, lambda text: os.write(writer, f"{text}\n".encode()) and None)
            code = 0 if shim.shim_seen() >= nth else 99
            shim.shim_arm(b"", 0, 0)
        except (Infrastructure, OSError) as error:
            code = TOLD if isinstance(error, Infrastructure) or error.errno == how else 1
        except BaseException:  # noqa: BLE001  # told by the exit code
            traceback.print_exc()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        acknowledged = stream.read().split("\n")[:-1]
    return os.waitpid(pid, 0)[1], acknowledged


def examine(name: str, how: str, root: Path, template: Path | None) -> dict[str, Any]:
    shim, scenario = ctypes.CDLL(None), SCENARIOS[name]
    expected: list[str] | None = None
    failures: list[str] = []
    for nth in range(100_000):  # 0: undisturbed
        folder = root / f"{nth}"
        shutil.copytree(template, folder) if template else folder.mkdir()
        status, acknowledged = attempted(scenario, folder, nth or 10**9, HOW[how], shim)
        code = os.waitstatus_to_exitcode(status)
        if nth == 0:
            expected = scenario.seen(folder)
        else:
            if code == 99:  # it makes fewer writes than this
                break
            if code not in (0, -9, TOLD) or (code == -9) != (HOW[how] < 0):
                failures.append(f"write {nth}: ended with {code}")
            try:
                before = scenario.seen(folder) if name != "supervisor" else []
                lost = [text for text in acknowledged if text not in before]
                scenario.work(folder, lambda text: None)
                if lost or scenario.seen(folder) != expected:
                    failures.append(f"write {nth}: lost {lost}, or ended otherwise")
                atomic.sweep(folder)
            except Exception as error:  # noqa: BLE001  # any is a finding
                failures.append(f"write {nth}: {error!r}")
        shutil.rmtree(folder)
    return {"writes": nth - 1, "rows": len(expected or ()), "failures": failures}


if __name__ == "__main__":
    name, how, root, *template = sys.argv[1:]
    print(json.dumps(examine(name, how, Path(root), Path(template[0]) if template else None)))
