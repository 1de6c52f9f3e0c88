"""Where the harness keeps things outside a run folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: ``$HARNESS_CACHE``, or ``harness`` under the user's cache folder. Created when missing."""
    root = os.environ.get("HARNESS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) if root else Path(base) / "harness"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
