"""Where things lie in a run folder, and who may write there."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from harness.errors import HarnessError, Infrastructure

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class CellFolder:
    """What a worker reads and writes."""

    path: Path

    @property
    def cell(self) -> Path:
        return self.path / "cell.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def windows(self) -> Path:
        return self.path / "windows"

    @property
    def quantized(self) -> Path:
        return self.path / "quantized.safetensors"

    @property
    def packed(self) -> Path:
        """The layers as the kernels read them, where a task or ``--execute kernels`` runs those."""
        return self.path / "packed.safetensors"

    @property
    def quantized_report(self) -> Path:
        """Written after :attr:`quantized`: its presence says that the artifact is whole."""
        return self.path / "quantized.json"

    @property
    def tasks(self) -> Path:
        return self.path / "tasks"

    @property
    def end(self) -> Path:
        return self.path / "end.json"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def store(self) -> Path:
        return self.path / "run.sqlite"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs"

    def calibration(self, sha256: str) -> Path:
        """Raises HarnessError for what is no hash: it may come from a file that somebody wrote."""
        if not _SHA256.fullmatch(sha256):
            raise HarnessError(f"{sha256!r:.80} is no SHA-256", where=str(self.plan), fix="use another --out")
        return self.inputs / f"{sha256}.safetensors"

    def cell(self, cell_id: str) -> CellFolder:
        return CellFolder(self.path / "cells" / cell_id)

    @contextmanager
    def claimed(self) -> Iterator[Claim]:
        """Hold the folder as its only writer. Raises HarnessError naming the run that holds it.

        The kernel frees the lock when its holder dies, however it dies.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = self.lock.open("a+")
        except OSError as error:
            raise HarnessError(
                f"cannot write to the run folder: {error.strerror}", where=str(self.path), fix="choose another --out"
            ) from None
        with stream:
            self._lock(stream)
            stream.truncate(0)
            stream.write(
                f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n"
            )
            stream.flush()
            try:
                yield Claim(self, os.fstat(stream.fileno()))
            finally:
                stream.truncate(0)

    def _lock(self, stream: TextIO) -> None:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise HarnessError(
                f"another run is using this folder: {holder}",
                where=str(self.path),
                fix="wait for it, stop it, or choose another --out",
            ) from None
        except OSError as error:
            raise HarnessError(
                f"the file system of the run folder has no locks: {error.strerror}",
                where=str(self.path),
                fix="choose an --out on a local disk",
            ) from None


@dataclass(frozen=True)
class Claim:
    """Proof that a run folder is held, by the open lock file."""

    folder: RunFolder
    lock: os.stat_result

    def check(self) -> None:
        """Raises Infrastructure when the folder was deleted or moved: what is written from then on is lost."""
        try:
            now = self.folder.lock.stat()
        except FileNotFoundError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (self.lock.st_dev, self.lock.st_ino):
            raise Infrastructure(
                "the run folder was deleted or moved while the run was going",
                where=str(self.folder.path),
                fix="put it back and run the same command again: it keeps what is in the folder",
            )
