"""On what a run ran: versions, processor, memory, GPU, code. Recorded and shown, never hashed into a cell."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from harness import __version__
from harness.limits import processors

PACKAGES = (
    "torch", "transformers", "lm_eval", "safetensors", "tokenizers", "datasets", "numpy", "scipy", "pandas", "triton",
)  # fmt: skip
_CPU_FLAGS = {
    "avx2",
    "fma",
    "f16c",
    "avx512bw",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
    "sve",
}


def capture(threads: int) -> dict[str, Any]:
    """All of it, JSON-able."""
    return {
        "harness": __version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": cpu(),
        "processors": processors(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": list(gpus()),
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """The processor's name and those of its abilities that matter for low precision."""
    parts = (line.partition(":") for line in _text(Path("/proc/cpuinfo")).splitlines())
    rows = {key.strip(): value.strip() for key, _, value in parts}
    flags = set((rows.get("flags") or rows.get("Features") or "").split())
    return {"name": rows.get("model name") or platform.machine(), "flags": sorted(flags & _CPU_FLAGS)}


@functools.cache
def gpus() -> tuple[str, ...]:
    """Name, driver and memory of each NVIDIA GPU, as ``nvidia-smi`` tells; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if done.returncode == 0 else ()


def default_device() -> str:
    """``cuda`` where there is a GPU and a torch that can use it, otherwise ``cpu``."""
    torch = version("torch")
    return "cuda" if torch is not None and "+cpu" not in torch and gpus() else "cpu"


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with ``+`` when it was changed since; None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
