"""The files of cells at an fsspec URL (``s3://…``, ``gs://…``, ``/shared/folder``), for machines without a common disk.

Whoever puts files there tells their SHA-256 to whoever gets them; a file that is not what was told is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from harness import atomic
from harness.errors import Infrastructure
from harness.runfolder import CellFolder

Digests = Mapping[str, str]  # SHA-256 of a cell's files, by their path in the cell's folder
_LISTING = "artifacts.json"
_NOT_KEPT = ("cell.json", _LISTING)


@dataclass(frozen=True)
class Depot:
    """A folder at ``url`` with a folder for each cell."""

    url: str

    def put(self, folder: CellFolder, names: Iterable[str]) -> dict[str, str]:
        """Upload files of a cell. Returns their digests; raises what the file system raises."""
        system, root = self._opened()
        digests = {}
        for name in names:
            target = f"{root}/{folder.path.name}/{name}"
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            digests[name] = sha256(folder.path / name)
            system.put_file(str(folder.path / name), target)
        return digests

    def get(self, folder: CellFolder, digests: Digests) -> None:
        """Download the files of a cell that are not there yet as told. Raises Infrastructure for any other content."""
        system, root = self._opened()
        for name, digest in digests.items():
            here = inside(folder, name)
            if here.is_file() and sha256(here) == digest:
                continue
            there = f"{root}/{folder.path.name}/{name}"
            with atomic.replacing(here) as temporary:
                system.get_file(there, str(temporary))
                if sha256(temporary) != digest:
                    raise Infrastructure(f"{there} is not what was uploaded", where=self.url, fix="run again")

    def _opened(self) -> tuple[Any, str]:
        import fsspec

        system, root = fsspec.url_to_fs(self.url)
        return system, root.rstrip("/")


def left_files(folder: CellFolder) -> list[str]:
    """What a worker leaves that is worth keeping: everything but half-written files and its checkpoints."""
    found = (path.relative_to(folder.path) for path in sorted(folder.path.rglob("*")) if path.is_file())
    return [
        str(path)
        for path in found
        if str(path) not in _NOT_KEPT and path.parts[0] != folder.windows.name and not atomic.is_temporary(path)
    ]


def is_heavy(name: str, folder: CellFolder) -> bool:
    """Whether a file stays where it was uploaded: no report reads it, and it is as large as a model."""
    return name in (folder.quantized.name, folder.packed.name)


def listed(folder: CellFolder) -> tuple[str | None, dict[str, str]]:
    """Where the files of a cell were uploaded to, and their digests; (None, {}) for a cell that has all its own."""
    path = folder.path / _LISTING
    if not path.is_file():
        return None, {}
    value = json.loads(path.read_text())
    return value["url"], value["files"]


def enlist(folder: CellFolder, depot: Depot, digests: Digests) -> None:
    """Write down in a cell's folder what lies at the depot."""
    url, before = listed(folder)
    atomic.write_json(
        folder.path / _LISTING, {"url": depot.url, "files": (before if url == depot.url else {}) | dict(digests)}
    )


def fetch_missing(folder: CellFolder) -> None:
    """Have in a cell's folder all that was ever uploaded of it, to go on from there."""
    url, files = listed(folder)
    if url is not None:
        Depot(url).get(folder, {name: digest for name, digest in files.items() if not inside(folder, name).exists()})


def artifact_url(folder: CellFolder) -> str | None:
    """Where the integers of a cell lie that are not in its folder; None where they were not uploaded."""
    url, files = listed(folder)
    name = folder.quantized.name
    return f"{url}/{folder.path.name}/{name}" if url is not None and name in files else None


def inside(folder: CellFolder, name: str) -> Path:
    """The path of a cell's file. Raises Infrastructure for a name that leads out of the folder."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise Infrastructure(f"{name!r} is no name of a cell's file", where=str(folder.path))
    return folder.path.joinpath(*parts)


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
