"""What the user asks for, in the user's own words: command-line flags, or a TOML file with the same names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError, unknown


@dataclass(frozen=True)
class Request:
    """The keys of a TOML file and the flags of ``harness run``, with their defaults. Nothing is checked yet."""

    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("W4A16", "W4A8", "W4A4")
    tasks: tuple[str, ...] = ("pydoc",)
    calibration: str = "pydoc:32x512"
    data_root: str | None = None
    seed: int = 0
    dtype: str = "default"
    device: str = "auto"
    execute: str = "simulation"
    limit: int | None = None
    apply_chat_template: bool = False
    out: str | None = None
    executor: str = "local"
    address: str | None = None
    artifacts: str | None = None
    jobs: int | None = None
    threads: int | None = None
    timeout: float | None = None
    memory: str | None = None

    @property
    def name(self) -> str:
        """A folder name for the run, the same whenever the same is asked for: the models and a hash."""
        decisive = {key: value for key, value in dataclasses.asdict(self).items() if key not in _HOW}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
        return "-".join([*(re.sub(r"[^\w.]+", "-", Path(model).name) for model in self.models), digest])[-100:]


_WORDS = {
    bool: ("true or false", "true"), int: ("an integer", "1"), float: ("a number", "1"), str: ("a string", '"…"'),
}  # fmt: skip
_HOW = (
    "out",
    "executor",
    "address",
    "artifacts",
    "jobs",
    "threads",
    "timeout",
    "memory",
)  # how a request is carried out, not what is asked


class FileKeys(NamedTuple):
    """What a TOML file says: its sound keys, and what is wrong with the others, to be told with all else that is."""

    values: dict[str, Any]
    problems: tuple[HarnessError, ...]


def read_toml(path: Path, *, quick: bool = False) -> FileKeys:
    """The keys of a TOML file; with ``quick`` those of its table ``quick`` win.

    Raises HarnessError for a broken file or where there is no such table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise HarnessError(
            f"no file {str(path)!r}", fix="check the path; flags alone work too: harness run --help"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"cannot read {str(path)!r}: {error}", fix="give a TOML file") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise HarnessError(
            f"broken TOML: {error}", where=str(path), fix='write for example  methods = ["rtn"]'
        ) from None
    hints = typing.get_type_hints(Request)
    tables = [table]
    if isinstance(table.get("quick"), dict):
        tables.append(table.pop("quick"))
    problems: list[HarnessError] = []
    for each in tables:
        for key, value in list(each.items()):
            if problem := _problem(key, value, hints, f"{path}:{_line(text, key)}"):
                problems.append(problem)
                del each[key]
    if quick and len(tables) == 1:
        raise HarnessError(
            "the file says nothing of a quick run",
            where=str(path),
            fix="write a table [quick] with the keys that differ",
        )
    chosen = table | tables[-1] if quick else table
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
    return FileKeys(values, tuple(problems))


def request_from(table: Mapping[str, Any], flags: Mapping[str, Any]) -> Request:
    """A file's keys and the flags beside it; a flag that is given (not None) wins."""
    given = {key: value for key, value in flags.items() if value is not None}
    return dataclasses.replace(Request(), **{**table, **given})


def _problem(key: str, value: object, hints: Mapping[str, Any], where: str) -> HarnessError | None:
    if key not in hints:
        error = unknown("key", key, hints, listing="harness run --help")
        return HarnessError(error.what, where=where, fix=f"{error.fix}; keys: {', '.join(hints)}")
    kinds = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if good else HarnessError(f"{key} is not a list of strings", where=where, fix=f'{key} = ["…", "…"]')
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
        words, example = _WORDS[kind]
        return HarnessError(f"{key} is not {words}", where=where, fix=f"write {key} = {example}")
    return None


def _line(text: str, key: str) -> int:
    match = re.search(rf"""^\s*(\[\s*)?["']?{re.escape(key)}["']?\s*[=.\]]""", text, flags=re.MULTILINE)
    return text.count("\n", 0, match.end()) + 1 if match else 1
