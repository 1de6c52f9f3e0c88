"""Time several callables fairly: interleaved, caches flushed before every call, every sample kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

_DRIFT = 0.25  # relative change of the baseline between the two halves of a run beyond which times say little


class Timer(Protocol):
    """Seconds of one call, after flushing the caches if ``flush``."""

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float: ...


class CpuTimer:
    """``perf_counter``; flushing writes a buffer larger than the last-level cache."""

    def __init__(self, flush_bytes: int) -> None:
        self._buffer = torch.zeros(flush_bytes, dtype=torch.uint8)

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float:
        if flush:
            self._buffer.add_(1)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


class CudaTimer:
    """CUDA events around one call; flushing zeroes a buffer of twice the L2 cache."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.empty(max(256 << 20, 2 * size), dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            self._buffer.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3


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


def interleaved(
    works: Mapping[str, Callable[[], object]], timer: Timer, *, rounds: int, flush: bool = True
) -> dict[str, Samples]:
    """Each callable once a round, after two rounds that do not count. ``rounds``: 4 at least."""
    for _ in range(2):
        for work in works.values():
            timer(work, flush=flush)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(timer(work, flush=flush))
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}


def ratio(slow: Samples, fast: Samples) -> float:
    """How many times as long: the median over rounds, in which both met the same machine."""
    pairs: Sequence[float] = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return statistics.median(pairs)
