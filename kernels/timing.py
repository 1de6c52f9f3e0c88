"""Time several callables fairly: interleaved, caches flushed before every call, every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from harness.kernels.benchfile import Samples


class Timer(Protocol):
    """Seconds of one call, after flushing the caches if ``flush``."""

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float: ...


class CpuTimer:
    """Seconds of ``clock``; flushing writes a buffer larger than the last-level cache."""

    def __init__(self, flush_bytes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._buffer = torch.zeros(flush_bytes, dtype=torch.uint8)
        self._clock = clock

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float:
        if flush:
            self._buffer.add_(1)
        start = self._clock()
        work()
        return self._clock() - start


class CudaTimer:
    """CUDA events around one call; flushing zeroes a buffer of twice the L2 cache.

    The GPU is kept busy while the call is launched, so that it begins with all of it there: what the host takes for a
    launch is not the kernel's time.
    """

    BUSY_CYCLES = 2_000_000  # about a millisecond

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._buffer = torch.empty(max(256 << 20, 2 * size), dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            self._buffer.zero_()
        torch.cuda._sleep(self.BUSY_CYCLES)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class GraphTimer:
    """One of some calls in a CUDA graph: no launches between them. Their weights stay in the L2 cache, if they fit."""

    CALLS = 20

    def __call__(self, work: Callable[[], object], *, flush: bool) -> float:
        graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(graph):
            for _ in range(self.CALLS):
                work()
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.CALLS


def interleaved(
    works: Mapping[str, Callable[[], object]],
    timer: Timer,
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
    flush: bool = True,
) -> dict[str, Samples]:
    """Each callable once a round, ``before`` it what is not timed, after two rounds that do not count.

    Every other round goes backwards: what the call before has left in a cache that flushing does not reach helps each
    of two neighbours as often as the other. ``rounds``: 4 at least.
    """
    for _ in range(2):
        for work in works.values():
            before()
            timer(work, flush=flush)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in reversed(list(works)) if number % 2 else works:
            before()
            taken[name].append(timer(works[name], flush=flush))
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}
