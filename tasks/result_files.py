"""Where a task's result lies in a cell's folder, and its summary; imports nothing heavy, so the supervisor can read it.

``<slug>.json`` holds the numbers and is written last: a task is done when it is there. ``<slug>.safetensors`` beside
it holds the outcomes of the single samples.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from harness.errors import HarnessError


def slug(key: str) -> str:
    """A file name for a task's key, and no other key's."""
    plain = re.sub(r"[^a-z0-9_=.-]+", "-", key.lower())[:80]
    return plain if plain == key else f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def summary_path(folder: Path, key: str) -> Path:
    return folder / f"{slug(key)}.json"


def samples_path(folder: Path, key: str) -> Path:
    return folder / f"{slug(key)}.safetensors"


def read_summary(folder: Path, key: str) -> dict[str, Any] | None:
    """``task``, ``seconds``, ``manifest`` and ``measurements`` (metric, value, stderr, n, higher_is_better, samples).

    None if the task is not done. Raises HarnessError for a file that is not this task's result.
    """
    path = summary_path(folder, key)
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        matches = summary["task"] == key
    except (ValueError, KeyError, TypeError, RecursionError):
        matches = False
    if not matches:
        raise HarnessError(f"this is not the result of task {key}", where=str(path), fix="delete it and run again")
    return summary
