"""Times of kernels against those of an earlier run: the noise that they are held to is that of their own samples.

A sample is the path's time over that of a float product in the same round, which met the same machine: what the
machine was doing cancels. Two sets of them are compared by the test of Mann and Whitney (Ann. Math. Stat. 18, 1947);
the difference and its interval are those of Hodges and Lehmann (Ann. Math. Stat. 34, 1963) that belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from harness.kernels.benchfile import Bench, Timing
from harness.reports.statistics import CONFIDENCE, Comparison, Interval, Verdict

SECONDS = "kernel_seconds"
_MACHINE = ("processor", "processors", "gpus")
Key = tuple[str, int, int, int]


def same_machine(one: Bench, other: Bench) -> bool:
    return one.device_name == other.device_name and all(one.machine.get(k) == other.machine.get(k) for k in _MACHINE)


def paired(one: Bench, other: Bench | None) -> Iterator[tuple[Timing, Timing | None]]:
    """The baseline's rows, each with the candidate's of the same setting, layer and number of tokens."""
    theirs = {_key(row): row for row in other.timings} if other else {}
    for row in one.timings:
        yield row, theirs.get(_key(row))


def compare_times(one: Timing, other: Timing, margin: float) -> Comparison:
    """``other`` against ``one``; slower by up to the fraction ``margin`` counts as no difference."""
    before, after = (np.log(_relative(row)) for row in (one, other))
    shifts = np.sort(np.subtract.outer(after, before).ravel())
    middle = float(np.median(shifts))
    low, high = _ends(shifts, len(before), len(after))
    edges = math.log1p(-margin), math.log1p(margin)
    claim: Verdict = "same" if edges[0] <= middle <= edges[1] else "worse" if middle > 0 else "better"
    p_values = {
        "worse": _p(before + edges[1], after, "greater"),
        "better": _p(before + edges[0], after, "less"),
        "same": max(_p(before + edges[0], after, "greater"), _p(before + edges[1], after, "less")),
    }
    return Comparison(
        metric=SECONDS, n=min(len(before), len(after)), baseline=one.path.median, candidate=other.path.median,
        relative=True, difference=math.expm1(middle), interval=Interval(math.expm1(low), math.expm1(high)),
        margin=margin, claim=claim, p_value=p_values[claim],
    )  # fmt: skip


def _relative(row: Timing) -> NDArray[np.float64]:
    """The path's seconds over the geometric mean of the float products', round by round."""
    floats = [np.log(taken.seconds) for taken in row.baselines.values()]
    return np.asarray(np.array(row.path.seconds) / np.exp(np.mean(floats, axis=0)))


def _p(before: NDArray[np.float64], after: NDArray[np.float64], alternative: str) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(after, before, alternative=alternative).pvalue)


def _ends(shifts: Sequence[float] | NDArray[np.float64], n: int, m: int) -> tuple[float, float]:
    """Of the interval of the median shift: as many pairwise shifts left out on each side as the test's tail holds."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    out = max(0, math.floor(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12)))
    return float(shifts[out]), float(shifts[len(shifts) - 1 - out])


def _key(row: Timing) -> Key:
    return row.setting, row.outputs, row.inputs, row.tokens
