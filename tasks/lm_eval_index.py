"""Names of lm-eval's tasks, groups and tags, read from its YAML files without importing it.

lm-eval's own index parses 14,000 files at every start, which takes 10 s. Here the few keys that name things are read
with a regular expression. The outcome is shipped for the pinned version, and cached for any other.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import atomic
from harness.errors import HarnessError
from harness.paths import cache_dir

_FORMAT = 1
_KEY = re.compile(r"""^["']?(task|group|tag|include|class)["']?[ ]*:(.*(?:\n[ \t]*-[ ].*|\n[ \t]*(?:\#.*)?$)*)""", re.M)
_FILE_READERS = frozenset({"arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text", "xml"})


@dataclass(frozen=True)
class Index:
    """``files``: task or group -> its YAML file below the tasks folder; ``tags``: tag -> its tasks."""

    files: dict[str, str]
    tags: dict[str, list[str]]

    def __contains__(self, name: str) -> bool:
        return name in self.files or name in self.tags


def is_known(name: str) -> bool:
    """Whether lm-eval has a task, group or tag of this name."""
    return name in index()


def names() -> list[str]:
    return [*index().files, *index().tags]


def tasks_folder() -> Path:
    """lm-eval's folder of task definitions. Raises HarnessError if lm-eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise HarnessError("lm-eval is not installed", fix="pip install lm-eval")
    return Path(spec.origin).parent / "tasks"


@functools.cache
def index() -> Index:
    """What is shipped for this version of lm-eval, or cached; else from a scan of all files, which is then cached."""
    shipped = shipped_index()
    if shipped.is_file():
        return Index(**json.loads(gzip.decompress(shipped.read_bytes())))
    path = _cache_file()
    if path.is_file():
        return Index(**json.loads(path.read_text()))
    built = scan(tasks_folder())
    atomic.write_json(path, asdict(built))
    return built


def shipped_index() -> Path:
    """Where the installed version's index would be: so that even the first mistyped name is answered at once."""
    return Path(__file__).parent / f"lm_eval_index-{importlib.metadata.version('lm_eval')}.json.gz"


def definition_files(name: str) -> dict[str, Path]:
    """The YAML file of ``name`` and, for a group or tag, of all that it holds: name -> file."""
    found: dict[str, Path] = {}
    pending = [name]
    while pending:
        current = pending.pop()
        path = _indexed_file(current)
        if path is not None and current not in found:
            found[current] = path
            pending += [member["task"] for member in _members(load_yaml(path)) if "task" in member]
        elif path is None:
            pending += index().tags.get(current, [])
    return dict(sorted(found.items()))


def datasets_of(name: str) -> list[str]:
    """The dataset repositories that a task, or all members of a group or tag, name in their definitions."""
    repositories = set()
    for path in definition_files(name).values():
        config = load_yaml(path)
        repositories |= {str(part["dataset_path"]) for part in (config, *_members(config)) if part.get("dataset_path")}
    return sorted(repositories - _FILE_READERS)


def load_yaml(path: Path) -> dict[str, Any]:
    """A definition with its includes merged; references to functions (``!function``) become None."""
    import yaml  # a dependency of lm-eval

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Reads data only: nothing that a file names is imported."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    config: dict[str, Any] = yaml.load(path.read_bytes(), Loader)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= load_yaml(path.parent / include)
    return merged | config


def _members(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a group's definition lists, groups within groups opened."""
    listed = config.get("task")
    for member in listed if isinstance(listed, list) else []:
        if isinstance(member, str):
            yield {"task": member}
        elif isinstance(member.get("task"), list):
            yield from _members(member)
        else:
            yield {"task": member.get("task", member.get("group"))} | member


# --- the index -------------------------------------------------------------------------------------------------------


def _cache_file() -> Path:
    version = importlib.metadata.version("lm_eval")
    place = hashlib.sha256(str(tasks_folder()).encode()).hexdigest()[:8]
    return cache_dir() / f"lm-eval-tasks-{version}-{place}-{_FORMAT}.json"


def _indexed_file(name: str) -> Path | None:
    relative = index().files.get(name)
    return tasks_folder() / relative if relative else None


def scan(folder: Path) -> Index:
    """Every name that the files below ``folder`` define."""
    read: dict[Path, dict[str, list[str]]] = {}
    files: dict[str, str] = {}
    tags: dict[str, list[str]] = {}
    for path in _yaml_files(folder):
        defined, *tagged = _names_in(path, read) or [""]
        if not defined or defined in files:  # the first file of a name counts, as in lm-eval
            continue
        files[defined] = os.path.relpath(path, folder)
        for tag in tagged:
            tags.setdefault(tag, []).append(defined)
    return Index(files, {tag: tasks for tag, tasks in tags.items() if tag not in files})


@functools.cache
def _yaml_files(folder: Path) -> list[Path]:
    """In lm-eval's order, that of the paths as text."""
    found = [f"{root}/{name}" for root, _, names in os.walk(folder) for name in names if name.endswith(".yaml")]
    return [Path(path) for path in sorted(found)]


def _names_in(path: Path, read: dict[Path, dict[str, list[str]]]) -> list[str]:
    """The name that a file defines, then the tags it puts on it; empty for a file that defines none."""
    keys = _keys(path, read)
    if "group" in keys and "class" not in keys:
        return keys["group"][:1]
    return keys.get("task", [])[:1] + keys.get("tag", [])


def _keys(path: Path, read: dict[Path, dict[str, list[str]]]) -> dict[str, list[str]]:
    """The naming keys of a file, its includes merged."""
    if path not in read:
        read[path] = {}  # an include that leads back here adds nothing
        own = {key: _values(text) for key, text in _KEY.findall(path.read_text(encoding="utf-8"))}
        merged: dict[str, list[str]] = {}
        for include in own.pop("include", []):
            if (path.parent / include).is_file():
                merged |= _keys((path.parent / include).resolve(), read)
        read[path] = merged | own
    return read[path]


def _values(text: str) -> list[str]:
    """What stands after a key: one value, ``[a, b]``, or a list of lines ``- a``."""
    first, *lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.split("\n"))
    items = first.strip("[]").split(",") if first else [line.removeprefix("- ") for line in lines]
    return [item.strip().strip("\"'") for item in items if item.strip()]
