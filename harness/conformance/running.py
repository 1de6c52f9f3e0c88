"""``harness methods check``: the suite in a process of its own for each method, under a deadline and a limit of memory.

Nothing here imports torch. A method that hangs, eats the memory, crashes or leaves takes its own process down; what it
was being asked is then told as failed, with how the process ended.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.endings import Ending, classify
from harness.environment import allowed
from harness.limits import Limits
from harness.pool import Command, Interrupted, Pool
from harness.runfolder import RunFolder
from harness.supervisor import child_environment


@dataclass
class Verdict:
    """What the suite found about a method, as it comes in."""

    method: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    """check, model, state, message, seconds."""
    peak_bytes: int | None = None
    seconds: float = 0.0
    log: str = ""
    asking: tuple[str, str] = ("interface", "")
    """The check that is running, and the model."""
    concluded: bool = False

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row["state"] != "failed" for row in self.rows)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Note what the process said."""
        match event:
            case {"event": "begin", "check": check, "model": model}:
                self.asking = (check, model)
            case {"event": "outcome", **row}:
                self.rows.append(row)
            case {"event": "broken", "message": message}:
                self.concluded = True
                self._fail(*self.asking, message)
            case {"event": "end", "unexpected": unexpected, "peak_bytes": peak}:
                self.concluded, self.peak_bytes = True, peak
                for check in unexpected:
                    self._fail(
                        check, "", "declared an expected failure, and passes on every model: take it off the list"
                    )

    def close(self, ending: Ending, log: Path) -> None:
        """Note how the process ended."""
        self.seconds, self.peak_bytes = ending.seconds, self.peak_bytes or ending.peak_bytes
        self.log = log.read_text(errors="replace") if log.is_file() else ""
        if not self.concluded:
            self._fail(*self.asking, "{}: {}".format(*classify(ending, None)))

    def _fail(self, check: str, model: str, message: str) -> None:
        self.rows.append({"check": check, "model": model, "state": "failed", "message": message, "seconds": 0.0})


def check_methods(
    methods: Sequence[str],
    *,
    real: Path | None = None,
    limits: Limits | None = None,
    on_event: Callable[[str, Mapping[str, Any]], None] = lambda method, event: None,
) -> Iterator[Verdict]:
    """Examine ``methods`` (names or files, with options) on five tiny models, and on the checkpoint ``real``.

    As many at a time as ``limits`` has jobs; verdicts come as they are reached. Raises Interrupted.
    """
    verdicts = {method: Verdict(method) for method in methods}

    with tempfile.TemporaryDirectory() as folder:
        environment = {**allowed(), **child_environment(RunFolder(Path(folder)))}
        pool = Pool(limits or Limits())
        commands = [_command(Path(folder, str(i)), method, real, environment) for i, method in enumerate(verdicts)]
        for command, happening in pool.run(commands):
            if not isinstance(happening, Ending):
                verdicts[command.name].hear(happening)
                on_event(command.name, happening)
            elif pool.interrupted_by is None:
                verdicts[command.name].close(happening, command.log)
                yield verdicts[command.name]
        if pool.interrupted_by is not None:
            raise Interrupted(pool.interrupted_by)


def _command(folder: Path, method: str, real: Path | None, environment: Mapping[str, str]) -> Command:
    folder.mkdir()
    question = folder / "question.json"
    question.write_text(json.dumps({"method": method, "real": str(real) if real else None}))
    words = (sys.executable, "-P", "-m", "harness.conformance.child", str(question))
    return Command(method, words, environment, folder / "log")
