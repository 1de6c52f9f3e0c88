"""What this machine can run, found out without importing anything heavy here."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness import provenance
from harness.corpora import CORPORA, corpus_problem, evaluation_text
from harness.errors import HarnessError, Infrastructure
from harness.kernels import native
from harness.limits import processors, show_bytes
from harness.paths import cache_dir

if TYPE_CHECKING:
    from harness.tasks.catalogue import TaskSpec

_HUB = ("huggingface.co", 443)
_TORCH = """
import torch
print(torch.__version__, "with", torch.get_num_threads(), "threads,", torch.backends.cpu.get_cpu_capability())
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 1e9:.0f} GB")
"""
_LEAST_DISK_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``missing`` is no fault of the machine; ``bad`` keeps runs from working."""

    what: str
    state: Literal["good", "missing", "bad"]
    detail: str


def examine(data_root: Path | None, *, hub: bool) -> Iterator[Finding]:
    """Every finding, quick ones first. ``hub`` asks whether the Hugging Face hub answers."""
    yield Finding("python", "good" if sys.version_info >= (3, 11) else "bad", sys.version.split()[0])
    yield from _packages()
    processor = provenance.cpu()
    yield Finding("processor", "good", f"{processors()} × {processor['name']} ({' '.join(processor['flags'])})")
    yield Finding("memory", "good", f"{show_bytes(_available_bytes())} available")
    yield from _disk()
    yield from _torch()
    triton = provenance.version("triton")
    runs = triton is not None and bool(provenance.gpus())
    yield Finding(
        "triton", "good" if runs else "missing", f"{triton or 'not installed'}" + ("" if runs else ", no GPU for it")
    )
    reason = native.unavailable()
    found = reason or f"W4A16 and products of integers by {native.instructions()}"
    yield Finding("C kernels", "missing" if reason else "good", found)
    yield from _data(data_root)
    if hub:
        yield _hub()


def examine_tasks(texts: Sequence[str], data_root: Path | None) -> Iterator[Finding]:
    """Whether everything that these tasks read is there, found out by loading it as a run would."""
    from harness.tasks.catalogue import parse_task, task_problems
    from harness.tasks.presets import expand

    for text in expand(texts):
        spec = parse_task(text)
        problems = task_problems([spec], data_root)
        if problems:
            yield from (Finding(f"task {text}", "bad", f"{one.what}; {one.fix}") for one in problems)
            continue
        try:
            yield Finding(f"task {text}", "good", _documents(spec, data_root))
        except (HarnessError, Infrastructure) as error:
            yield Finding(f"task {text}", "bad", f"{error.what}; {error.fix}")


def _documents(spec: TaskSpec, data_root: Path | None) -> str:
    if spec.kind != "lm_eval":
        return f"{len(evaluation_text(spec.corpus, data_root))} characters"
    from harness.tasks.lm_eval_loading import load_tasks

    loaded = load_tasks(spec, data_root)["tasks"]
    return f"{sum(len(task.eval_docs) for task in loaded.values())} documents of {len(loaded)} tasks"


def _packages() -> Iterator[Finding]:
    """What the package says it needs, against what is installed."""
    from packaging.requirements import Requirement

    try:
        needs = importlib.metadata.requires("ptq-harness") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []
        yield Finding("harness", "missing", "runs from its source folder; `pip install -e .` also checks its packages")
    for text in needs:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = provenance.version(need.name)
        fits = found is not None and need.specifier.contains(found, prereleases=True)
        yield Finding(need.name, "good" if fits else "bad", f"{found or 'not installed'} (needs {need.specifier})")


def _disk() -> Iterator[Finding]:
    for what, folder in (("disk for runs", Path.cwd()), ("disk for models", cache_dir())):
        free = shutil.disk_usage(folder).free
        state: Literal["good", "bad"] = "good" if free >= _LEAST_DISK_BYTES else "bad"
        yield Finding(what, state, f"{show_bytes(free)} free at {folder}")


def _torch() -> Iterator[Finding]:
    """Asked of torch itself, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("torch runs", "bad", "did not answer in two minutes")
        return
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        yield Finding("torch runs", "bad", (done.stderr.strip().splitlines() or ["says nothing"])[-1])
        return
    yield Finding("torch runs", "good", lines[0])
    yield Finding(
        "GPU", "good" if lines[1:] else "missing", "; ".join(lines[1:]) or "none that torch can use; CPU only"
    )


def _data(data_root: Path | None) -> Iterator[Finding]:
    if data_root is None:
        yield Finding("data root", "missing", "none given (--data-root or HARNESS_DATA_ROOT); pydoc tasks work without")
        return
    if not data_root.is_dir():
        yield Finding("data root", "bad", f"{data_root} is not a folder")
        return
    folders = sorted(str(card.parent.relative_to(data_root)) for card in data_root.glob("*/*/README.md"))
    yield Finding("data root", "good", f"{data_root}: {', '.join(folders) or 'no dataset folders'}")
    for name, corpus in CORPORA.items():
        there = [split for split in corpus.splits if corpus_problem(name, split, data_root) is None]
        yield Finding(f"corpus {name}", "good" if there else "missing", ", ".join(there) or "not in the data root")


def _hub() -> Finding:
    try:
        socket.create_connection(_HUB, timeout=3).close()
    except OSError as error:
        return Finding("hub", "missing", f"{_HUB[0]} does not answer ({error}); local models and data roots work")
    return Finding("hub", "good", f"{_HUB[0]} answers")


def _available_bytes() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0
