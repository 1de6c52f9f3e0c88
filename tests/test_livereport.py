"""The report beside a run: written after cells, by a process of its own, and last of all the finished one."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

from made_runs import CELL, FP, KNOWN, make_run

from harness.display import PlainWatcher
from harness.livereport import reporting, write_report


def test_the_report_is_written_as_cells_end(tmp_path: Path) -> None:
    numbers = {"piqa": (0.5, 0.01)}
    run = make_run(tmp_path / "run", [(FP, numbers, "ok"), (CELL, {}, "pending")])
    said = io.StringIO()
    with reporting(PlainWatcher(said), run) as watcher:
        watcher.due(2)
        watcher.started("x", "tiny fp")
        assert not (run / "report.html").exists()
        watcher.ended("x", "tiny fp", "ok", None, 1.0)
    text = (run / "report.html").read_text()
    assert "1 cell has not ended yet" in text
    assert 'http-equiv="refresh"' in text
    assert "ok tiny fp" in said.getvalue()


def test_a_finished_report_does_not_load_itself_again_and_is_written_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(KNOWN, run)
    report = write_report(run)
    assert report is not None
    assert "refresh" not in report.read_text()
    os.utime(report, (2**31, 2**31))
    assert write_report(run) == report
    assert report.stat().st_mtime == 2**31
    assert write_report(tmp_path / "nothing") is None
