"""What ``harness bench`` measured, as it lies in a run folder: every sample, and the machine that they were taken on.

No torch here: reports and the regression gate read these files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from harness import atomic
from harness.errors import HarnessError

VERSION = 2
NO_CUDA = "not measured (no CUDA device)"
DECODE_TOKENS = 16  # up to which a product is bound by reading the weight
BASELINES = ("float16", "bfloat16", "float32")
IN_A_GRAPH = " in a CUDA graph, warm"  # behind the name of what was timed so, too
_DRIFT = 0.25  # relative change between the two halves of a run beyond which times say little


@dataclass(frozen=True)
class Samples:
    """Seconds of every call, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third

    @property
    def drifted(self) -> bool:
        """Whether the second half of the run was another machine, as it were."""
        half = len(self.seconds) // 2
        before, after = statistics.median(self.seconds[:half]), statistics.median(self.seconds[half:])
        return abs(after - before) > _DRIFT * before


def ratio(slow: Samples, fast: Samples) -> float:
    """How many times as long: the median over rounds, in which both met the same machine.

    That of the rounds forwards and that of those backwards, of which the geometric mean is taken.
    """
    rounds: Sequence[float] = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return statistics.geometric_mean(statistics.median(way) for way in (rounds[::2], rounds[1::2]) if way)


@dataclass(frozen=True)
class Timing:
    """One path on one shape.

    ``samples``: of the path, its parts, and the float products of the same rounds. ``bytes`` and ``operations``: what
    must be moved and multiplied at the least. ``bandwidth`` (bytes a second) and ``peak`` (operations a second, in the
    path's arithmetic): the most that this machine was measured to do in the same process.
    """

    setting: str
    operator: str
    outputs: int
    inputs: int
    tokens: int
    relative_error: float
    bytes: float
    operations: float
    bandwidth: float
    peak: float
    samples: Mapping[str, Samples]

    @property
    def path(self) -> Samples:
        return self.samples["path"]

    @property
    def phase(self) -> str:
        return "decode" if self.tokens <= DECODE_TOKENS else "prefill"

    @property
    def baselines(self) -> dict[str, Samples]:
        """The float products, by type."""
        return {name: self.samples[name] for name in BASELINES if name in self.samples}

    @property
    def graphed(self) -> dict[str, Samples]:
        """Of calls without launches between them, in a CUDA graph: the path and the float products, by name."""
        names = {name: name + IN_A_GRAPH for name in ("path", *BASELINES)}
        return {name: self.samples[key] for name, key in names.items() if key in self.samples}

    @property
    def drifted(self) -> bool:
        return any(samples.drifted for samples in self.samples.values())

    @property
    def percent_of_roofline(self) -> float:
        return 100 * max(self.bytes / self.bandwidth, self.operations / self.peak) / self.path.median

    def faster_than(self, baseline: str) -> float:
        """How many times as fast as a float product of the same rounds."""
        return ratio(self.samples[baseline], self.path)


@dataclass(frozen=True)
class Bench:
    """One run of ``harness bench`` on one device. ``machine``: provenance, for people and for comparisons."""

    created: str
    device: str
    device_name: str
    machine: Mapping[str, Any]
    timings: tuple[Timing, ...]

    def write(self, folder: Path) -> Path:
        """Into a run folder, instead of what was measured there on this kind of device before."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"bench-{self.device}.json"
        atomic.write_json(path, {"version": VERSION, **asdict(self), "timings": [_stored(row) for row in self.timings]})
        return path

    @classmethod
    def read(cls, path: Path) -> Bench:
        """Raises HarnessError for a file that is not one."""
        try:
            content = json.loads(path.read_text())
            if content.pop("version") != VERSION:
                raise ValueError("another version")
            return cls(**{**content, "timings": tuple(map(_timing, content["timings"]))})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HarnessError(f"no measurements of kernels: {error}", where=str(path), fix="harness bench") from error


def benches(folder: Path) -> list[Bench]:
    """All that was measured into a run folder, by device."""
    return [Bench.read(path) for path in sorted(folder.glob("bench-*.json"))]


def _stored(timing: Timing) -> dict[str, Any]:
    row = {field.name: getattr(timing, field.name) for field in fields(timing)}
    low, high = timing.path.quartiles
    derived = {"median_seconds": timing.path.median, "quartiles_seconds": [low, high], "n": len(timing.path.seconds)}
    return {**row, "samples": {name: list(taken.seconds) for name, taken in timing.samples.items()}, **derived}


def _timing(row: Mapping[str, Any]) -> Timing:
    known = {field.name: row[field.name] for field in fields(Timing)}
    samples = {name: Samples(tuple(map(float, seconds))) for name, seconds in row["samples"].items()}
    if "path" not in samples or any(len(taken.seconds) < 4 for taken in samples.values()):
        raise ValueError("too few samples")
    return Timing(**{**known, "samples": samples})
