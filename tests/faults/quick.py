"""Runs whose cells take milliseconds: the supervisor, the processes and the store are real, the workers stand in."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import plan, processes
from harness.cells import Cell
from harness.checkpoint import open_checkpoint
from harness.planfile import ModelFacts, Plan, terms_of, write_plan
from harness.request import Request
from harness.runfolder import RunFolder

HERE = Path(__file__).parent
TASKS = ("pydoc:length=32:windows=2", "pydoc:length=64:windows=2")
SETTINGS = ("W4A16", "W8A16")
CALIBRATION, CALIBRATION_SHA256 = "pydoc:2x32", "c" * 64
TIMES = ("seconds", "created")
Rows = list[dict[str, Any]]


class Quick:
    """A checkpoint of one small layer, and how to run cells on it."""

    def __init__(self, folder: Path) -> None:
        self.model = folder
        data = bytes(64 * 64 * 4)
        entry = {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, len(data)]}
        header = json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)

    def planned(self, out: Path, settings: Sequence[str] = SETTINGS, tasks: Sequence[str] = TASKS) -> Path:
        """A run folder with its plan and calibration, so that nothing has to be prepared."""
        folder = RunFolder(out)
        draft = plan.draft(self.request(settings, tasks))
        facts = {
            source.name: ModelFacts(
                self.model, open_checkpoint(self.model).sha256(), CALIBRATION_SHA256,
                tuple(task.key for task in draft.tasks),
            )
            for source in draft.models
        }  # fmt: skip
        folder.inputs.mkdir(parents=True)
        folder.calibration(CALIBRATION_SHA256).write_bytes(b"")
        write_plan(folder.plan, Plan(terms_of(draft), facts, tuple(plan.complete(draft, facts))))
        return out

    def request(self, settings: Sequence[str] = SETTINGS, tasks: Sequence[str] = TASKS) -> Request:
        return Request(
            methods=("rtn",), models=(str(self.model),), settings=tuple(settings), tasks=tuple(tasks),
            calibration=CALIBRATION,
        )  # fmt: skip

    def words(
        self, out: Path, *more: str, settings: Sequence[str] = SETTINGS, tasks: Sequence[str] = TASKS
    ) -> list[str]:
        return [
            sys.executable, "-P", str(HERE / "start.py"), "run", "--methods", "rtn", "--models", str(self.model),
            "--settings", ",".join(settings), "--tasks", ",".join(tasks), "--calibration", CALIBRATION, "--threads",
            "1", "--out", str(out), *more,
        ]  # fmt: skip

    def start(
        self, out: Path, *more: str, behave: Mapping[str, Any] | None = None, environment: Mapping[str, str] = {},
        **what: Any,
    ) -> subprocess.Popen[str]:  # fmt: skip
        told = {**os.environ, "HARNESS_STAND_IN": json.dumps(dict(behave or {})), **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(self.words(out, *more, **what), stdout=pipe, stderr=pipe, text=True, env=told)

    def run(self, out: Path, *more: str, **what: Any) -> subprocess.CompletedProcess[str]:
        """Raises TimeoutExpired for a run that hangs."""
        process = self.start(out, *more, **what)
        try:
            said, complaint = process.communicate(timeout=250)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, said, complaint)


def results(out: Path) -> Rows:
    """The rows of a run without their times."""
    from harness import results

    rows = results.measurement_rows(results.load(out))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def statuses(out: Path) -> dict[str, str | None]:
    """How the last attempt at each setting ended."""
    from harness import results

    return {found.cell.setting: found.last.status if found.last else None for found in results.load(out)}


def cell(out: Path, setting: str) -> Cell:
    from harness.planfile import read_plan

    found = read_plan(RunFolder(out).plan)
    assert found is not None
    return next(one for one in found.cells if one.setting == setting)


def left_behind(out: Path) -> list[processes.Process]:
    return processes.marked(f"HARNESS_RUN_FOLDER={out.resolve()}")


def content(out: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file's bytes, inode and time: whether it was written anew."""
    return {
        str(path.relative_to(out)): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
