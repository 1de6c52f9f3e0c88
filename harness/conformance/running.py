"""``harness methods check``: the suite in a process of its own, under a deadline and a limit of memory.

Nothing here imports torch. A method that hangs, eats the memory, crashes or leaves takes its own process down; what it
was being asked is then told as failed, with how the process ended.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.endings import classify
from harness.environment import allowed
from harness.limits import Limits
from harness.pool import Command, Pool
from harness.runfolder import RunFolder
from harness.supervisor import child_environment


@dataclass
class Verdict:
    """What a suite found, as it comes in."""

    rows: list[Mapping[str, Any]] = field(default_factory=list)
    """check, model, state, message, seconds."""
    peak_bytes: int | None = None
    seconds: float = 0.0
    interrupted_by: int | None = None
    log: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row["state"] != "failed" for row in self.rows)


def check_method(
    method: str,
    *,
    real: Path | None = None,
    limits: Limits | None = None,
    on_row: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Verdict:
    """Examine ``method`` (a name or a file, with options) on five tiny models, and on the checkpoint ``real``."""
    verdict, running, ended = Verdict(), {"check": "interface", "model": ""}, False

    def add(row: Mapping[str, Any]) -> None:
        verdict.rows.append(row)
        on_row(row)

    def failed(check: str, model: str, message: str) -> None:
        add({"check": check, "model": model, "state": "failed", "message": message, "seconds": 0.0})

    def heard(_: Command, event: Mapping[str, Any]) -> None:
        nonlocal ended
        match event:
            case {"event": "begin", "check": check, "model": model}:
                running.update(check=check, model=model)
            case {"event": "outcome", **row}:
                add(row)
            case {"event": "broken", "message": message}:
                ended = True
                failed(running["check"], running["model"], message)
            case {"event": "end", "unexpected": unexpected, "peak_bytes": peak}:
                ended, verdict.peak_bytes = True, peak
                for check in unexpected:
                    failed(check, "", "declared an expected failure, and passes on every model: take it off the list")

    with tempfile.TemporaryDirectory() as folder:
        question, log = Path(folder, "question.json"), Path(folder, "log")
        question.write_text(json.dumps({"method": method, "real": str(real) if real else None}))
        words = (sys.executable, "-P", "-m", "harness.conformance.child", str(question))
        environment = {**allowed(), **child_environment(RunFolder(Path(folder)))}
        pool = Pool(limits or Limits(), heard)
        for _, ending in pool.run([Command(method, words, environment, log)]):
            verdict.seconds, verdict.peak_bytes = ending.seconds, verdict.peak_bytes or ending.peak_bytes
            if not ended and pool.interrupted_by is None:
                status, reason = classify(ending, None)
                failed(running["check"], running["model"], f"{status}: {reason}")
        verdict.interrupted_by = pool.interrupted_by
        verdict.log = log.read_text(errors="replace") if log.is_file() else ""
    return verdict
