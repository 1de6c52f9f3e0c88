"""What may be said of the numbers of a table: intervals, differences from the baseline, who is best.

Everything comes from the outcomes of the single samples (:mod:`harness.reports.statistics`) while there are few enough
numbers; of a large table, or where a run folder holds the store alone, from the standard errors in the store, unpaired
and normal. :attr:`Judge.basis` says which it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from harness.errors import HarnessError
from harness.reports.gathered import Gathered, Known
from harness.reports.outcomes import Outcomes, outcomes_of
from harness.reports.statistics import Comparison, Estimate, Interval, compare, estimate, verdicts
from harness.store import Measured

Mark = Literal["best", "second", ""]
MANY = 2000  # numbers; reading and resampling the samples behind more would take minutes
_NORMAL = 1.959963984540054  # the two-sided 95% point
_EXPONENTIAL = ("token_perplexity", "word_perplexity", "perplexity", "byte_perplexity")


@dataclass
class Judge:
    """Remembers the outcomes that it has read: a baseline is compared with many."""

    from_samples: bool
    _outcomes: dict[tuple[str, str, str], Outcomes | None] = field(default_factory=dict)
    _without_samples: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, gathered: Gathered) -> Judge:
        return cls(from_samples=gathered.numbers <= MANY)

    @property
    def basis(self) -> str:
        """For a caption, once all has been judged."""
        if not self.from_samples:
            return "95% intervals and ties from standard errors, not paired: the table is large"
        words = "95% intervals and ties from the outcomes of the same samples, paired"
        if self._without_samples:
            words += f"; where those are not kept, from standard errors: {', '.join(sorted(self._without_samples))}"
        return words

    def estimate(self, known: Known, task: str) -> Estimate | None:
        """The main number of a task with its interval; None where there is no number."""
        row = known.row(task)
        if row is None:
            return None
        outcomes = self.outcomes(known, task)
        return estimate(outcomes) if outcomes is not None else _from_store(row)

    def compare(self, baseline: Known, candidate: Known, task: str) -> Comparison | None:
        """The candidate against the baseline; None where one has no number, or they are not of the same samples."""
        rows = baseline.row(task), candidate.row(task)
        if rows[0] is None or rows[1] is None or rows[0].metric != rows[1].metric:
            return None
        both = self.outcomes(baseline, task), self.outcomes(candidate, task)
        if both[0] is not None and both[1] is not None:
            try:
                return compare(both[0], both[1])
            except HarnessError:  # of other samples: no comparison is better than a wrong one
                return None
        return _compared_by_store(rows[0], rows[1])

    def outcomes(self, known: Known, task: str) -> Outcomes | None:
        """The outcomes behind the main number; None where they are not kept, or not looked at."""
        if not self.from_samples:
            return None
        key = known.source.name, known.cell.id, task
        if key not in self._outcomes:
            self._outcomes[key] = _outcomes(known, task)
            if self._outcomes[key] is None:
                self._without_samples.add(task)
        return self._outcomes[key]


def marks(judge: Judge, rivals: Sequence[Known], task: str) -> dict[str, Mark]:
    """By cell: ``best`` for the best number and those that cannot be told from it, ``second`` for the next ones.

    Nobody is marked where there is nobody to beat, or too few samples to tell.
    """
    rows = {known.cell.id: (known, row) for known in rivals if (row := known.row(task)) is not None}
    if len(rows) < 2 or len({row.metric for _, row in rows.values()}) > 1:
        return {}
    best, rest = _leaders(judge, rows, task)
    if best is None:
        return {}
    found: dict[str, Mark] = dict.fromkeys(best, "best")
    second = list(rest) if len(rest) == 1 else _leaders(judge, rest, task)[0] or ()
    return found | dict.fromkeys(second, "second")


def _leaders(
    judge: Judge, rows: Mapping[str, tuple[Known, Measured]], task: str
) -> tuple[list[str] | None, dict[str, tuple[Known, Measured]]]:
    """Those that cannot be told from the best, None when that cannot be said; and all others."""
    if not rows:
        return None, {}
    up = next(iter(rows.values()))[1].higher_is_better
    leader, _ = (max if up else min)(rows.values(), key=lambda entry: entry[1].value)
    others = {id: entry for id, entry in rows.items() if id != leader.cell.id}
    compared = {id: judge.compare(leader, known, task) for id, (known, _) in others.items()}
    judged = {id: found for id, found in compared.items() if found is not None and found.interval is not None}
    if len(judged) < len(others):
        return None, {}
    worse = {id for id, verdict in zip(judged, verdicts(list(judged.values())), strict=True) if verdict == "worse"}
    return [id for id in rows if id not in worse], {id: entry for id, entry in rows.items() if id in worse}


def _outcomes(known: Known, task: str) -> Outcomes | None:
    from harness.tasks.measurement import read_result

    folder, name = known.place(task)
    try:
        result = read_result(folder, name)
        if result is None:
            return None
        found = outcomes_of(result.measurements[0], result.manifest)
    except (HarnessError, OSError, KeyError):  # not kept for this metric, or left behind when the store was copied
        return None
    row = known.row(task)
    same = row is not None and row.metric == found.metric and math.isclose(row.value, found.value, rel_tol=1e-6)
    return found if same else None


def _from_store(row: Measured) -> Estimate:
    if row.stderr is None:
        return Estimate(row.value, None, None, row.n)
    reach = _NORMAL * row.stderr
    return Estimate(row.value, row.stderr, Interval(row.value - reach, row.value + reach), row.n)


def _compared_by_store(baseline: Measured, candidate: Measured) -> Comparison:
    """By the two standard errors, as if of other samples: it sees less than a paired comparison would."""
    spread: float | None
    relative = baseline.metric in _EXPONENTIAL and baseline.value > 0 and candidate.value > 0
    stderrs = baseline.stderr, candidate.stderr
    interval, p_value = None, 1.0
    if relative:
        ratio = math.log(candidate.value / baseline.value)
        both = zip(stderrs, (baseline.value, candidate.value), strict=True)
        spread = _hypot(*(stderr / value if stderr is not None else None for stderr, value in both))
    else:
        ratio = candidate.value - baseline.value
        spread = _hypot(*stderrs)
    if spread:
        low, high = ratio - _NORMAL * spread, ratio + _NORMAL * spread
        interval = Interval(math.expm1(low), math.expm1(high)) if relative else Interval(low, high)
        p_value = math.erfc(abs(ratio) / spread / math.sqrt(2))
    difference = math.expm1(ratio) if relative else ratio
    up = bool(baseline.higher_is_better)
    return Comparison(
        metric=baseline.metric, n=min(baseline.n, candidate.n), baseline=baseline.value, candidate=candidate.value,
        relative=relative, difference=difference, interval=interval, margin=0.0,
        claim="same" if difference == 0 else "better" if (difference > 0) == up else "worse", p_value=p_value,
    )  # fmt: skip


def _hypot(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else math.hypot(one, other)
