"""DuQuant's rotation search: which product of random rotations leaves the smallest range of values (algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

CENTRES = 64  # of a cloud of rows, chosen twice
Rows = NDArray[np.float32]
Rotation = NDArray[np.float64]  # [B, B]


def base_rotation(size: int) -> Rotation:
    """An orthogonal matrix whose first row is flat, size^−½ everywhere, and whose first column is all but empty.

    A Helmert matrix with its first and last rows, and columns, exchanged.
    """
    i, j = np.arange(1, size)[:, None], np.arange(size)
    helmert = np.where(j < i, 1.0, np.where(j == i, -i, 0.0)) / np.sqrt(i * (i + 1))
    helmert = np.concatenate([helmert, np.full((1, size), size**-0.5)])
    order = exchange(size, size - 1)
    return helmert[order][:, order]


def exchange(size: int, channel: int) -> NDArray[np.int64]:
    """The order of channels with the first and ``channel`` exchanged."""
    order = np.arange(size)
    order[0], order[channel] = channel, 0
    return order


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """The base rotation, with all columns but the first turned at random: an outlier in channel 0 is spread."""
    q, _ = np.linalg.qr(torch.randn(size - 1, size - 1, generator=generator).double().numpy())
    base = base_rotation(size)
    return np.concatenate([base[:, :1], base[:, 1:] @ q], axis=1)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Within, numpy computes on one thread: a search is thousands of small products.

    More threads would wait for each other, and for torch's, which keep a processor busy for a while after their work.
    """
    limit: AbstractContextManager[Any] = _thread_pools().limit(limits=1, user_api="blas")
    return limit


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


@dataclass(frozen=True)
class RotationSearch:
    """A rotation R = M_0 M_1 … M_{steps−1}, and the line of candidates that it was chosen from."""

    rotation: Rotation
    steps: int
    scores: tuple[float, ...]
    """Of the first so many factors, from none to all."""
    selected: tuple[int, ...]
    """The channel that each factor spreads."""


def greedy_rotation(
    rows: Rows,
    draw: Callable[[], Rotation],
    max_steps: int,
    *,
    by: Literal["paper", "official"],
    score: Literal["range", "absmax"],
) -> RotationSearch:
    """Algorithm 1: turn the channel with the largest value to the front, again and again, and keep the best product.

    ``rows`` [n, B], float32. Each factor is S M S, where S exchanges the first channel and the one with the outlier.
    """
    cloud, size = Cloud.of(rows), rows.shape[1]
    rotation = best = np.eye(size)
    least, scores, selected = float("inf"), list[float](), list[int]()
    for step in range(max_steps + 1):
        low, high = cloud.extremes(rotation.astype(np.float32), score)
        scores.append(high.value - low.value if score == "range" else max(high.value, -low.value))
        if scores[-1] < least:
            best, least = rotation, scores[-1]
        if step < max_steps:
            outlier = high if high.value > -low.value else low
            selected.append(outlier.channel if by == "paper" else outlier.row % size)
            order = exchange(size, selected[-1])
            rotation = (rotation[:, order] @ draw())[:, order]
    return RotationSearch(best, scores.index(least), tuple(scores), tuple(selected))


@dataclass(frozen=True)
class Extreme:
    """A value of rotated rows, and where it is."""

    value: float
    row: int
    channel: int


@dataclass(frozen=True)
class Cloud:
    """Rows whose extremes after a rotation are wanted, again and again, without rotating all of them.

    A rotation keeps lengths and distances. So no value of a row exceeds its length, nor the largest value of another
    row by more than the distance between the two. A few rows, the centres, are rotated first; of the others only those
    that these bounds allow to hold a new extreme. The result is exact.
    """

    rows: Rows
    """[n, B], longest first."""
    order: NDArray[np.int64]
    """[n], where they were."""
    falling: Rows
    """[n], negative lengths."""
    centres: NDArray[np.int64]
    """[c], their row numbers."""
    nearest: NDArray[np.int64]
    """[n], for each row which of the centres stands for it."""
    distances: Rows
    """[n], to that centre."""

    @classmethod
    def of(cls, rows: Rows) -> Cloud:
        """Centres are spread over all lengths, and once more over the longest."""
        lengths = np.linalg.norm(rows, axis=1)
        order = np.argsort(-lengths, kind="stable")
        rows, lengths = rows[order], lengths[order]
        evenly, early = np.linspace(0, len(rows) - 1, CENTRES), np.geomspace(1, len(rows), CENTRES) - 1
        centres = np.union1d(evenly.astype(int), early.astype(int))
        products = rows @ rows[centres].T
        nearest = (np.square(lengths[centres]) - 2 * products).argmin(axis=1)
        distances = np.linalg.norm(rows - rows[centres][nearest], axis=1)
        slack = np.float32(1 + 1e-5)  # the bounds hold for real numbers; this is for what float32 rounds off
        return cls(rows, order, -lengths * slack, centres, nearest, distances * slack)

    def extremes(self, rotation: Rows, score: Literal["range", "absmax"]) -> tuple[Extreme, Extreme]:
        """Smallest and largest value of the rotated rows; for ``absmax`` only the one of larger magnitude is exact."""
        central = rotation.T @ self.rows[self.centres].T
        lows, highs = central.min(axis=0), central.max(axis=0)
        low, high = lows.min(), highs.max()
        if score == "absmax":
            high = max(high, -low)
            low = -high
        longer = np.searchsorted(self.falling, -min(high, -low))
        room = np.minimum(high - highs, lows - low)  # a row this close to a centre cannot go beyond the extremes
        others = np.flatnonzero(self.distances[:longer] > room[self.nearest[:longer]])
        at_ends = self.centres[[lows.argmin(), highs.argmax()]]
        candidates = np.concatenate([at_ends, others])
        values = self.rows.take(candidates, axis=0) @ rotation
        return self._found(values, values.argmin(), candidates), self._found(values, values.argmax(), candidates)

    def _found(self, values: Rows, at: np.intp, candidates: NDArray[np.int64]) -> Extreme:
        row, channel = divmod(int(at), values.shape[1])
        return Extreme(float(values[row, channel]), int(self.order[candidates[row]]), channel)
