"""What one cell may use: processors, time, memory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from harness.errors import HarnessError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Limits:
    """``jobs`` cells at a time, each with ``threads`` threads and at most that much time and memory (None: no limit).

    The default of ``threads`` does not depend on ``jobs``: sums split over another number of threads round otherwise,
    and the integers of a cell must not depend on how many cells run beside it.
    """

    jobs: int = 1
    threads: int = 1
    timeout_seconds: float | None = None
    memory_bytes: int | None = None
    grace_seconds: float = 5.0


def processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def parse_bytes(text: str) -> int:
    """Read ``24GB``, ``800 MB``, ``1.5GiB``. Raises HarnessError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)?B\s*", text.upper())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < _UNITS["TI"] ** 2:
        raise HarnessError(f"memory {text!r} is not a size", fix="write for example 24GB or 1.5GiB")
    return int(size)


def show_bytes(size: float) -> str:
    """``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
