"""What a difference between two cells means: intervals, paired tests, verdicts; from per-sample outcomes only.

Two cells are compared on the differences of the same blocks (documents or windows): by the bootstrap over blocks, and
right or wrong answers also by McNemar's exact test. What can be said of a whole table is corrected for its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.errors import HarnessError
from harness.reports.outcomes import Outcomes, Vector, check_paired
from harness.reports.resampling import Spread, ratio, standard_error

Verdict = Literal["better", "worse", "same", "undecided"]

CONFIDENCE = 0.95
LEAST_BLOCKS = 5  # below that a resampled set of blocks is too often a single block over and over


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and its interval, all in the metric's units; None for too few blocks."""

    value: float
    stderr: float | None
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class SeedEstimate:
    """The mean over seeds. The variances are those of the mean: of other samples, and of other seeds.

    For perplexities the mean is the geometric one, and the variances are those of its logarithm.
    """

    value: float
    interval: Interval | None
    within_variance: float
    between_variance: float
    seeds: int
    n: int


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline on the same ``n`` blocks.

    ``difference``, ``interval`` and ``margin`` are candidate minus baseline in the metric's units, or with ``relative``
    (perplexities) candidate over baseline minus one. ``claim`` is what the estimate suggests, and ``p_value`` the
    chance of an estimate as clear as this if the truth lay where the claim just fails.
    """

    metric: str
    n: int
    baseline: float
    candidate: float
    relative: bool
    difference: float
    interval: Interval | None
    margin: float
    claim: Verdict
    p_value: float

    def verdict(self, alpha: float = 1 - CONFIDENCE) -> Verdict:
        """For a comparison on its own; :func:`verdicts` corrects those of a table."""
        return self.claim if self.p_value < alpha else "undecided"


# --- one cell --------------------------------------------------------------------------------------------------------


def estimate(outcomes: Outcomes, *, confidence: float = CONFIDENCE) -> Estimate:
    """The value with its interval: Wilson's for right or wrong answers, else from the studentized bootstrap."""
    if outcomes.n < LEAST_BLOCKS:
        return Estimate(outcomes.value, None, None, outcomes.n)
    spread = Spread.of(outcomes.total, outcomes.weight)
    if outcomes.right_or_wrong:
        from scipy.stats import binomtest

        found = binomtest(int(outcomes.total.sum()), outcomes.n).proportion_ci(confidence, method="wilson")
        return Estimate(outcomes.value, spread.stderr, Interval(float(found.low), float(found.high)), outcomes.n)
    stderr = spread.stderr * (outcomes.value if outcomes.exponential else 1.0)
    ends = spread.interval(confidence)
    interval = Interval(*map(outcomes.shown, ends)) if ends else None
    return Estimate(outcomes.value, stderr, interval, outcomes.n)


def over_seeds(outcomes: Sequence[Outcomes], *, confidence: float = CONFIDENCE) -> SeedEstimate:
    """One estimate of cells that differ in their seed only, measured on the same samples.

    More seeds shrink the variance between seeds and leave that within: the samples are the same. Raises Mismatch for
    samples that are not, ValueError for a single cell.
    """
    from scipy.stats import t

    if len(outcomes) < 2:
        raise ValueError("several seeds are needed")
    first = outcomes[0]
    for other in outcomes[1:]:
        check_paired(first, other)
    values = np.array([ratio(each.total, each.weight) for each in outcomes])
    averaged = np.mean([each.total / each.weight for each in outcomes], axis=0) * first.weight
    within = standard_error(averaged, first.weight) ** 2 if first.n > 1 else 0.0
    between = float(values.var(ddof=1)) / len(values)
    mean, variance = float(values.mean()), within + between
    # Satterthwaite's degrees of freedom of a sum of two variances.
    freedom = variance**2 / (within**2 / max(first.n - 1, 1) + between**2 / (len(values) - 1)) if variance else 1.0
    reach = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    interval = Interval(first.shown(mean - reach), first.shown(mean + reach)) if first.n >= LEAST_BLOCKS else None
    return SeedEstimate(first.shown(mean), interval, within, between, len(values), first.n)


# --- two cells -------------------------------------------------------------------------------------------------------


def compare(
    baseline: Outcomes, candidate: Outcomes, *, margin: float = 0.0, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare two cells, paired by sample. Differences up to ``margin`` count as none; for perplexities it is relative.

    Raises Mismatch for other samples, HarnessError for a margin that is not one.
    """
    check_paired(baseline, candidate)
    relative = baseline.exponential
    if not 0 <= margin < (1 if relative else math.inf):
        raise HarnessError(
            f"{margin} is no margin for {baseline.metric}",
            fix="give a fraction of the perplexity: 0.01" if relative else "give a number of at least 0",
        )
    differences, weight = candidate.total - baseline.total, baseline.weight
    change = ratio(differences, weight)
    difference = math.expm1(change) if relative else change
    binary = baseline.right_or_wrong and candidate.right_or_wrong
    interval, p_value = None, 1.0
    if np.array_equal(candidate.total, baseline.total) and not binary:
        interval, p_value = Interval(0.0, 0.0), 0.0  # the same numbers, sample by sample
    elif baseline.n >= LEAST_BLOCKS:
        spread = _paired_spread(differences, weight, pseudo=binary)
        if ends := spread.interval(confidence):
            interval = Interval(*map(math.expm1, ends)) if relative else Interval(*ends)
        edges = (math.log1p(-margin), math.log1p(margin)) if relative else (-margin, margin)
        p_value = _mcnemar(differences) if binary and not margin else spread.p_value(edges)
    return Comparison(
        metric=baseline.metric,
        n=baseline.n,
        baseline=baseline.value,
        candidate=candidate.value,
        relative=relative,
        difference=difference,
        interval=interval,
        margin=margin,
        claim=_claim(difference, margin, baseline.higher_is_better),
        p_value=p_value,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below alpha makes any false rejection at most alpha likely (Holm, 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def verdicts(comparisons: Sequence[Comparison], alpha: float = 1 - CONFIDENCE) -> list[Verdict]:
    """The verdicts of a table: the chance of any false one among them is at most ``alpha``."""
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [one.claim if p < alpha else "undecided" for one, p in zip(comparisons, adjusted, strict=True)]


def _claim(difference: float, margin: float, higher_is_better: bool) -> Verdict:
    if abs(difference) <= margin:
        return "same"
    return "better" if (difference > 0) == higher_is_better else "worse"


def _mcnemar(differences: Vector) -> float:
    """The exact test on the samples that only one of the two answers rightly."""
    from scipy.stats import binomtest

    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _paired_spread(differences: Vector, weight: Vector, *, pseudo: bool) -> Spread:
    """With ``pseudo`` two more pairs, one gained and one lost: no answer changed does not mean that none ever will.

    That is the adjustment of Bonett and Price (J. Educ. Behav. Stat. 37, 2012) for paired proportions.
    """
    if pseudo:
        differences, weight = np.append(differences, (1.0, -1.0)), np.append(weight, (1.0, 1.0))
    return Spread.of(differences, weight)
