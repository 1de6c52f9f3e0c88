"""Files that are there whole or not at all, whatever is killed when.

A file is written under a temporary name in its own folder, flushed to the disk, renamed over the target, and the
folder is flushed. A kill leaves the old file or the new one, and perhaps a temporary one, which :func:`sweep` removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on a clean exit it becomes ``path``, otherwise it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_MARK}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Raises ValueError for NaN and infinity: they are not JSON and not results."""
    write_text(path, json.dumps(value, allow_nan=False, sort_keys=True, indent=1) + "\n")


def sweep(folder: Path) -> None:
    """Remove what killed writers left below ``folder``; only for its one owner to call."""
    for stale in folder.rglob(f"{_MARK}*"):
        stale.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file is a half-written one."""
    return path.name.startswith(_MARK)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
