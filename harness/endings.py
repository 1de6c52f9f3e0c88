"""The closed set of ways in which a cell ends, and how an ending is told."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

STATUSES = (
    "ok", "unsupported", "bad_output", "error", "crashed", "oom_host", "oom_gpu", "timeout", "interrupted", "infra",
)  # fmt: skip
Status = Literal[
    "ok", "unsupported", "bad_output", "error", "crashed", "oom_host", "oom_gpu", "timeout", "interrupted", "infra"
]
RESUMED = ("interrupted", "infra")  # the machine's doing, not the method's: run again by the same command

Stopped = Literal["timeout", "memory", "interrupt"]


@dataclass(frozen=True)
class Ending:
    """How a child process ended, as its parent saw it."""

    returncode: int
    stopped: Stopped | None  # why the parent stopped it, if it did
    kernel_oom: bool  # the kernel killed something for want of memory in the meantime
    peak_bytes: int | None  # the most memory that its session was seen to hold
    seconds: float


@dataclass(frozen=True)
class Lost:
    """The machine that computed a cell failed, or could not begin: how the cell ended is not known."""

    reason: str
    seconds: float


Event = Mapping[str, Any]  # what a process says while it runs
Happening = Event | Ending


def classify(ending: Ending | Lost, result: Mapping[str, Any] | None) -> tuple[Status, str | None]:
    """The status of a cell and the reason in words. ``result`` is what the worker itself said last, if it did.

    A worker that said how it ended is believed, even if it was stopped while it left.
    """
    if result is not None:
        return result["status"], result["reason"]
    if isinstance(ending, Lost):
        return "infra", ending.reason
    if ending.stopped == "timeout":
        return "timeout", f"stopped after {ending.seconds:.0f} seconds"
    if ending.stopped == "memory":
        return "oom_host", f"stopped at {(ending.peak_bytes or 0) / 1e9:.2f} GB, above the limit of --memory"
    if ending.stopped == "interrupt":
        return "interrupted", "the run was stopped"
    if ending.returncode == -signal.SIGKILL and ending.kernel_oom:
        return "oom_host", "killed by the kernel for want of memory"
    if ending.returncode == -signal.SIGKILL:
        return "crashed", "killed by SIGKILL, which neither the run nor the kernel sent"
    if ending.returncode < 0:
        return "crashed", f"killed by {signal.Signals(-ending.returncode).name}"
    return "crashed", f"the process left with exit code {ending.returncode} and no result"


def resumes(status: str, returncode: int | None) -> bool:
    """Whether the same command runs a cell with this last ending again without being told to.

    A SIGKILL that neither the run nor the kernel sent says nothing about the method.
    """
    return status in RESUMED or (status == "crashed" and returncode == -signal.SIGKILL)
