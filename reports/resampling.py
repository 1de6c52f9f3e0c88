"""The bootstrap over blocks of a ratio of sums, studentized and symmetric about the estimate.

Hall, The Bootstrap and Edgeworth Expansion (1992), section 3.6. At the sixteen windows of a quick run, the plain
percentiles would be a tenth too narrow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.reports.outcomes import Vector

_DRAWS = 4999
_KEPT = 400  # blocks whose draws stay in memory: 16 MB


def ratio(total: Vector, weight: Vector) -> float:
    """Of the sums."""
    return float(total.sum() / weight.sum())


def standard_error(total: Vector, weight: Vector) -> float:
    """Of the ratio, linearized; exact for a mean."""
    n = len(total)
    residuals = total - ratio(total, weight) * weight
    return math.sqrt(float(residuals @ residuals) * n / (n - 1)) / float(weight.sum())


@dataclass(frozen=True)
class Spread:
    """A ratio of sums, its standard error, and the sorted distances of resampled ratios from it, in standard errors."""

    ratio: float
    stderr: float
    distances: Vector

    @classmethod
    def of(cls, total: Vector, weight: Vector) -> Spread:
        centre, stderr = ratio(total, weight), standard_error(total, weight)
        return cls(centre, stderr, _distances(total - centre * weight, weight) if stderr else np.zeros(1))

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """None when too many draws missed the few blocks that differ for their spread to be known."""
        reach = float(np.quantile(self.distances, confidence, method="higher")) * self.stderr
        return (self.ratio - reach, self.ratio + reach) if math.isfinite(reach) else None

    def p_value(self, edges: tuple[float, float]) -> float:
        """Two-sided, of the edge of the margin that is nearest to the estimate."""
        nearest = min(abs(self.ratio - edge) for edge in edges)
        if not self.stderr:
            return 1.0 if not nearest else 0.0
        beyond = len(self.distances) - np.searchsorted(self.distances, nearest / self.stderr)
        return float(beyond + 1) / (len(self.distances) + 1)


def _distances(residuals: Vector, weight: Vector) -> Vector:
    """|t| of ratios of resampled blocks, sorted; ``residuals`` sum to 0, so that the true ratio is 0 there.

    Equal blocks are drawn together: right or wrong answers have three kinds however many there are.
    """
    kinds, counts = np.unique(np.stack([residuals, weight], axis=1), axis=0, return_counts=True)
    r, w = kinds.T
    n = len(residuals)
    features = np.stack([r, w, r * r, r * w, w * w], axis=1)
    sums = np.concatenate([drawn @ features for drawn in _resampled(n, counts)])
    sum_r, sum_w, rr, rw, ww = sums.T
    found = sum_r / sum_w
    squares = np.maximum(rr - 2 * found * rw + found * found * ww, 0.0)
    stderr = np.sqrt(squares * n / (n - 1)) / sum_w
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(stderr > 0, np.abs(found) / stderr, np.where(found == 0, 0.0, np.inf))
    distances: Vector = np.sort(t)
    return distances


def _resampled(n: int, counts: npt.NDArray[np.int64]) -> Iterator[Vector]:
    """How often each kind of block is drawn: arrays [draws, kinds], the same ones for equal counts."""
    kinds = len(counts)
    if kinds == n <= _KEPT:
        yield _kept(n)
    elif kinds < n // 8:  # numpy's multinomial is fast for large counts and slow for many kinds
        yield np.random.default_rng(0).multinomial(n, counts / n, size=_DRAWS).astype(np.float64)
    else:
        yield from _counted(n, np.repeat(np.arange(kinds), counts))


@functools.lru_cache(maxsize=4)
def _kept(n: int) -> Vector:
    """The draws of ``n`` blocks that all differ: a table compares many cells on the same few windows."""
    return np.concatenate(list(_counted(n, np.arange(n))))


def _counted(n: int, kind_of: npt.NDArray[np.int64]) -> Iterator[Vector]:
    rng = np.random.default_rng(0)
    kinds = int(kind_of[-1]) + 1
    piece = max(1, 2**21 // n)
    for start in range(0, _DRAWS, piece):
        size = min(piece, _DRAWS - start)
        drawn = kind_of[rng.integers(n, size=(size, n))] + np.arange(size)[:, None] * kinds
        yield np.bincount(drawn.ravel(), minlength=size * kinds).reshape(size, kinds).astype(np.float64)
