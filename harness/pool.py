"""Child processes, a few at a time: started, watched, stopped at their limits, and gone with all they started.

Nothing here knows what the children compute. The loop sleeps until a child says something, ends, or reaches a limit,
or until the user interrupts; it never polls for an end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness import events, processes
from harness.endings import Ending, Happening, Stopped
from harness.limits import Limits

MARK = "HARNESS_RUN_FOLDER"  # in the environment of every child: what was left behind is known by it
_CHILD_MARK = "HARNESS_LOG"
_WATCHED_SECONDS, _GLANCED_SECONDS = 0.1, 1.0  # between looks at a child's memory, with and without a limit
_HURRY_SECONDS = 1.0  # what a second signal leaves to children that do not die at once
_CHUNKS = 64  # read from one child before the others have their turn
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Command:
    """What to start: its name (a cell's id), its words, its environment, where its output goes."""

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


@dataclass
class _Child:
    command: Command
    process: subprocess.Popen[bytes]
    pipe: int
    pidfd: int
    oom_kills: int  # the kernel's count when it started
    started: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    peak_bytes: int | None = None
    stopped: Stopped | None = None
    kill_at: float | None = None
    unread: bytes = b""

    def family(self) -> list[processes.Process]:
        """The live processes of its session, and those that left the session but carry its mark."""
        found = {process.pid: process for process in processes.session(self.process.pid)}
        for process in processes.marked(f"{_CHILD_MARK}={self.command.log}"):
            found.setdefault(process.pid, process)
        return list(found.values())


class Interrupted(Exception):
    """A signal arrived before the children were done."""

    def __init__(self, signal: int) -> None:
        self.signal = signal
        super().__init__(f"stopped by signal {signal}")


class Pool:
    """``jobs`` children at a time, within the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}
        self._happened: deque[tuple[Command, Happening]] = deque()
        self._signals: list[int] = []
        self._abandon_at: float | None = None

    @property
    def interrupted_by(self) -> int | None:
        """The first signal that asked to stop, if one did."""
        return self._signals[0] if self._signals else None

    def run(self, commands: Iterable[Command]) -> Generator[tuple[Command, Happening], None, None]:
        """Start the commands in order; yield what each says as it comes, and how it ended.

        Whoever stops iterating early stops the children.
        """
        waiting = iter(commands)
        with self._signals_noticed():
            try:
                self._fill(waiting)
                while self._children or self._happened:
                    while self._happened:
                        yield self._happened.popleft()
                    if not self._children:
                        break
                    for key, _ in self._selector.select(self._patience()):
                        key.data()
                    self._enforce()
                    self._fill(waiting)  # before what has ended is looked at: no processor waits for bookkeeping
            finally:
                self._abandon()

    def _fill(self, waiting: Iterator[Command]) -> None:
        while len(self._children) < self._limits.jobs and not self._signals:
            command = next(waiting, None)
            if command is None:
                return
            self._start(command)

    def _start(self, command: Command) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        environment = {**command.environment, events.VARIABLE: str(write_end), _CHILD_MARK: str(command.log)}
        try:
            with command.log.open("ab") as log:
                process = subprocess.Popen(
                    command.words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    pass_fds=(write_end,), start_new_session=True,
                )  # fmt: skip
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        child = _Child(command, process, read_end, os.pidfd_open(process.pid), processes.kernel_oom_kills())
        self._children[process.pid] = child
        self._selector.register(read_end, selectors.EVENT_READ, functools.partial(self._listen, child))
        self._selector.register(child.pidfd, selectors.EVENT_READ, functools.partial(self._bury, child))

    def _listen(self, child: _Child) -> None:
        """Pass on what the child said. The pipe's end is not the child's: a grandchild may hold it open."""
        if child.process.pid not in self._children:  # buried earlier in this round
            return
        for _ in range(_CHUNKS):
            try:
                chunk = os.read(child.pipe, 65536)
            except BlockingIOError:
                return
            if not chunk:
                if child.pipe in self._selector.get_map():
                    self._selector.unregister(child.pipe)
                return
            *lines, rest = (child.unread + chunk).split(b"\n")
            child.unread = rest[-65536:]
            for line in lines:
                self._tell(child, line)

    def _tell(self, child: _Child, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:  # a method wrote to a descriptor that is not its own; the harness writes whole lines
            return
        if isinstance(event, dict):
            self._happened.append((child.command, event))

    def _bury(self, child: _Child) -> None:
        """The child has ended: end what it left behind, hear it out, note how it ended."""
        returncode = child.process.wait()
        processes.end_all(child.family)
        self._listen(child)
        self._forget(child)
        kernel_oom = processes.kernel_oom_kills() > child.oom_kills
        seconds = time.monotonic() - child.started
        ending = Ending(returncode, child.stopped, kernel_oom, child.peak_bytes, seconds)
        self._happened.append((child.command, ending))

    def _patience(self) -> float:
        """Seconds until something must be done unasked."""
        now, limits = time.monotonic(), self._limits
        moments = [child.looked + self._look_interval for child in self._children.values()]
        moments += [child.kill_at for child in self._children.values() if child.kill_at is not None]
        if limits.timeout_seconds is not None:
            moments += [c.started + limits.timeout_seconds for c in self._children.values() if c.stopped is None]
        if self._abandon_at is not None:
            moments.append(self._abandon_at)
        return max(0.0, min(moments) - now)

    @property
    def _look_interval(self) -> float:
        return _GLANCED_SECONDS if self._limits.memory_bytes is None else _WATCHED_SECONDS

    def _enforce(self) -> None:
        now, limits = time.monotonic(), self._limits
        for child in self._children.values():
            if now >= child.looked + self._look_interval:
                self._look(child, now)
            if limits.timeout_seconds is not None and now >= child.started + limits.timeout_seconds:
                self._stop(child, "timeout")
            if child.kill_at is not None and now >= child.kill_at:
                self._kill(child)
        if self._abandon_at is not None and now >= self._abandon_at:
            self._abandon()

    def _look(self, child: _Child, now: float) -> None:
        child.looked = now
        resident = sum(process.resident_bytes for process in processes.session(child.process.pid))
        child.peak_bytes = max(child.peak_bytes or 0, resident)
        if self._limits.memory_bytes is not None and resident > self._limits.memory_bytes:
            child.stopped = child.stopped or "memory"
            self._kill(child)  # at once: a process that eats memory is not asked first

    def _stop(self, child: _Child, why: Stopped) -> None:
        """Ask the child and its family to end; after the grace they are made to."""
        if child.stopped is not None:
            return
        child.stopped, child.kill_at = why, time.monotonic() + self._limits.grace_seconds
        for process in child.family():
            processes.send(process.pid, signal.SIGTERM)

    def _kill(self, child: _Child) -> None:
        child.kill_at = None
        for process in child.family():
            processes.send(process.pid, signal.SIGKILL)

    def _abandon(self) -> None:
        """Leave at once: KILL every child and forget it; what it was doing counts as never ended."""
        for child in list(self._children.values()):
            self._kill(child)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=_HURRY_SECONDS)
            self._forget(child)

    def _forget(self, child: _Child) -> None:
        for descriptor in (child.pipe, child.pidfd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
            os.close(descriptor)
        del self._children[child.process.pid]

    def _interrupt(self, receiver: socket.socket) -> None:
        asked = [number for number in receiver.recv(64) if number in _SIGNALS]
        if not asked:  # another signal that this process has a handler for: it wakes the loop too
            return
        self._signals += asked
        for child in self._children.values():
            self._stop(child, "interrupt")
            if len(self._signals) > 1:
                self._kill(child)
        if len(self._signals) > 1:
            self._abandon_at = time.monotonic() + _HURRY_SECONDS

    @contextlib.contextmanager
    def _signals_noticed(self) -> Iterator[None]:
        """While children run, a signal is one more thing that the loop wakes up for."""
        receiver, sender = socket.socketpair()
        with receiver, sender, self._selector:
            sender.setblocking(False)
            self._selector.register(receiver, selectors.EVENT_READ, functools.partial(self._interrupt, receiver))
            handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
            wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(wakeup)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
