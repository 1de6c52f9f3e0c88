"""How a child process says how far it is: JSON lines through a pipe of its own, away from stdout and the log."""

from __future__ import annotations

import json
import os
import time

VARIABLE = "HARNESS_EVENTS_FD"
_INTERVAL_SECONDS = 0.1


class Events:
    """The child's end. Calling it is the :class:`harness.progress.Progress` that all long work takes."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._stage, self._said = "", 0.0

    @classmethod
    def from_environment(cls) -> Events:
        """The pipe that the parent handed down; without one, events go nowhere."""
        text = os.environ.pop(VARIABLE, None)
        if text is None:
            return cls(None)
        os.set_inheritable(int(text), False)  # a grandchild must not hold or write the pipe
        return cls(int(text))

    def send(self, event: str, **fields: object) -> None:
        if self._descriptor is None:
            return
        line = json.dumps({"event": event, **fields}, allow_nan=False) + "\n"
        os.write(self._descriptor, line.encode())

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Say progress, at most ten times a second within a stage."""
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._said < _INTERVAL_SECONDS:
            return
        self._stage, self._said = stage, now
        self.send("progress", stage=stage, done=done, total=total, detail=detail[:120])
