"""Plays :mod:`harness.worker` without torch: real files, events and ends; what a cell "computes" follows from its id.

``HARNESS_STAND_IN`` says, as JSON, how the cell of a setting behaves, and how long a step takes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from harness import atomic, worker
from harness.errors import BadOutput
from harness.tasks.result_files import samples_path, summary_path


class StandIn(worker.Job):
    def run(self) -> None:
        asked = json.loads(os.environ.get("HARNESS_STAND_IN", "{}"))
        misbehave(asked.get(self.cell.setting))
        pause = asked.get("step_seconds", 0.0)
        pending = self.pending_tasks()
        if not self.folder.quantized_report.is_file():
            with self.timings.timing("quantize"):
                self.progress("quantize", 0, 1)
                time.sleep(pause)
                atomic.write_bytes(self.folder.quantized, self.made_up("integers").encode() * 50)
                self.write_report(time.monotonic() % 1, 4.25, 1000, ())
        with self.timings.timing("evaluate"):
            for task in pending:
                time.sleep(pause)
                self.score(task.key)

    def score(self, task: str) -> None:
        number = int(self.made_up(task)[:8], 16) / 2**31
        measurement = {
            "metric": "token_perplexity", "value": 1 + number, "stderr": number / 8, "n": 2, "higher_is_better": False,
            "samples": {},
        }  # fmt: skip
        summary = {"task": task, "seconds": number, "manifest": {}, "measurements": [measurement]}
        atomic.write_bytes(samples_path(self.folder.tasks, task), self.made_up(task).encode())
        atomic.write_json(summary_path(self.folder.tasks, task), summary)
        self.progress.send("measured", task=task)

    def made_up(self, what: str) -> str:
        return hashlib.sha256(f"{self.cell.id} {what}".encode()).hexdigest()


def misbehave(how: str | Sequence[str] | None) -> None:
    match how:
        case None:
            return
        case "raise":
            raise ValueError("broken on purpose")
        case "memory error":
            raise MemoryError
        case "nan":
            raise BadOutput("NaN in layers.0")
        case "leave":
            os._exit(0)
        case "exit 3":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "cling":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for how_started in ({"start_new_session": True}, {"close_fds": False}):
                subprocess.Popen(["sleep", "600"], **how_started)
            time.sleep(600)
        case "eat":
            hoard = []
            while True:
                hoard.append(b"x" * 20_000_000)
                time.sleep(0.01)
        case "change":
            os.environ["BEHIND"] = "x"
            os.umask(0)
            os.chdir("/")
        case "tell":
            print("environment:", json.dumps(dict(os.environ)), "umask:", os.umask(0o22), flush=True)


if __name__ == "__main__":
    worker.Job = StandIn  # type: ignore[misc]
    worker.main()
