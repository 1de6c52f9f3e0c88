"""A report that is written again as cells finish, so that a long run can be watched in a browser.

Each writing is a process of its own: this one, which supervises the run, imports nothing heavy, and nothing that goes
wrong with a report touches a cell.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.runfolder import RunFolder
from harness.supervisor import Watcher

FILE = "report.html"


class ReportingWatcher:
    """Tells another watcher everything, and writes ``report.html`` into the run folder after every cell."""

    def __init__(self, watcher: Watcher, run: Path) -> None:
        self._watcher, self._run = watcher, run
        self._writing: subprocess.Popen[bytes] | None = None

    def due(self, cells: int) -> None:
        self._watcher.due(cells)

    def started(self, name: str, title: str) -> None:
        self._watcher.started(name, title)

    def progress(self, name: str, stage: str, done: int, total: int, detail: str) -> None:
        self._watcher.progress(name, stage, done, total, detail)

    def ended(self, name: str, title: str, status: str, reason: str | None, seconds: float) -> None:
        self._watcher.ended(name, title, status, reason, seconds)
        if (self._run / "plan.json").is_file() and (self._writing is None or self._writing.poll() is not None):
            self._writing = subprocess.Popen(
                _words(self._run), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        """Until nothing is being written: the last report must not be an earlier one."""
        if self._writing is not None:
            self._writing.wait()


@contextmanager
def reporting(watcher: Watcher, run: Path) -> Iterator[Watcher]:
    """The watcher that also writes the report after every cell."""
    both = ReportingWatcher(watcher, run)
    try:
        yield both
    finally:
        both.wait()


def write_report(run: Path) -> Path | None:
    """Write the report of a run, unless it is there; None when that failed: ``harness report`` would tell why."""
    report, store = run / FILE, RunFolder(run).store
    if report.is_file() and store.is_file() and report.stat().st_mtime > store.stat().st_mtime:
        return report
    done = subprocess.run(_words(run), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return report if done.returncode == 0 else None


def _words(run: Path) -> list[str]:
    return [
        sys.executable, "-P", "-m", "harness", "report", str(run), "--format", "html", "--to", str(run / FILE),
    ]  # fmt: skip
