"""Processes as /proc shows them: who belongs to a session, how much memory it holds, who was left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG = 1


class Process(NamedTuple):
    pid: int
    state: str  # one letter; Z is a zombie: dead, only not yet waited for
    session: int
    resident_bytes: int


def session(leader: int) -> list[Process]:
    """The live processes of a session."""
    return [process for process in _living() if process.session == leader]


def marked(mark: str) -> list[Process]:
    """The live processes that have ``mark`` (``NAME=value``) in their environment, wherever they moved to."""
    needle = mark.encode()
    return [process for process in _living() if process.pid != os.getpid() and needle in _environment(process.pid)]


def end_all(find: Callable[[], list[Process]], *, patience_seconds: float = 2.0) -> list[int]:
    """KILL what ``find`` finds until it finds nothing. Returns the pids that were killed."""
    killed: dict[int, None] = {}
    give_up = time.monotonic() + patience_seconds
    while (left := find()) and time.monotonic() < give_up:
        for process in left:
            killed[process.pid] = None
            send(process.pid, signal.SIGKILL)
        time.sleep(0.005)
    return list(killed)


def send(pid: int, signum: int) -> None:
    """A signal to a process that may be gone already."""
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        return


def give_back_freed_memory() -> None:
    """What the allocator has kept of freed memory goes back to the machine. Where it is not glibc's nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_resident_bytes() -> int:
    """The most memory that this process ever held (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def kernel_oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, on this machine and in this control group."""
    total = 0
    for path in _oom_counters():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def die_with(parent: int) -> bool:
    """Have the kernel KILL this process when its parent dies. False if the parent is gone already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


def _living() -> Iterable[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := _read(int(name))) is not None and process.state not in "ZX":
            yield process


def _read(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return Process(pid, fields[0], int(fields[3]), int(fields[21]) * _PAGE_BYTES)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _oom_counters() -> list[Path]:
    counters = [Path("/proc/vmstat")]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return counters
    for line in groups:
        if line.startswith("0::"):
            counters.append(Path("/sys/fs/cgroup") / line[3:].lstrip("/") / "memory.events")
    return counters
