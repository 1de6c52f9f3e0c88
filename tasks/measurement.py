"""What a task hands back: numbers with standard errors, and the outcome of every sample behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from harness import atomic
from harness.errors import BadOutput
from harness.tasks.result_files import read_summary, samples_path, summary_path

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Measurement:
    """One number of a model on a task.

    ``samples`` holds what is known of each sample: arrays of ``n`` rows, always with the ids that say which sample a
    row is (``window``; or ``doc_id`` and ``doc_hash``). Raises BadOutput for a value that is not finite.
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    samples: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, number in (("value", self.value), ("standard error", self.stderr)):
            if number is not None and not math.isfinite(number):
                raise BadOutput(f"the {name} of {self.metric} is {number}")
        for name, array in self.samples.items():
            if len(array) != self.n:
                raise ValueError(f"{self.metric}: {len(array)} rows of {name!r} for {self.n} samples")


@dataclass(frozen=True)
class TaskResult:
    """All measurements of one task, and how they were taken."""

    task: str
    measurements: tuple[Measurement, ...]
    seconds: float
    manifest: dict[str, Any]


def write_result(folder: Path, result: TaskResult) -> None:
    """Samples first, the summary last and atomically: a result is there whole or not at all."""
    tensors: dict[str, Array] = {}
    names: dict[int, str] = {}  # an array that several measurements share is written once
    measurements = []
    for measurement in result.measurements:
        for name, array in measurement.samples.items():
            if id(array) not in names:
                names[id(array)] = f"{measurement.metric}/{name}"
                tensors[names[id(array)]] = np.ascontiguousarray(array)
        measurements.append(
            {
                "metric": measurement.metric,
                "value": measurement.value,
                "stderr": measurement.stderr,
                "n": measurement.n,
                "higher_is_better": measurement.higher_is_better,
                "samples": {name: names[id(array)] for name, array in measurement.samples.items()},
            }
        )
    atomic.write_bytes(samples_path(folder, result.task), safetensors.numpy.save(tensors))
    summary = {"task": result.task, "seconds": result.seconds, "manifest": result.manifest}
    atomic.write_json(summary_path(folder, result.task), summary | {"measurements": measurements})


def read_result(folder: Path, key: str) -> TaskResult | None:
    """The result with its samples; None if the task is not done."""
    summary = read_summary(folder, key)
    if summary is None:
        return None
    tensors = safetensors.numpy.load_file(samples_path(folder, key))
    measurements = tuple(
        Measurement(**{**entry, "samples": {name: tensors[at] for name, at in entry["samples"].items()}})
        for entry in summary["measurements"]
    )
    return TaskResult(summary["task"], measurements, summary["seconds"], summary["manifest"])
