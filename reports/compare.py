"""The regression gate: a candidate run against a baseline run, cell by cell, on the same samples.

A cell fails when a metric is worse by more than its margin beyond doubt, when it has more bits, when it no longer ends
well, or when it can no longer be compared. The doubt is that of the whole gate: verdicts are corrected for its size.
"""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness import results, store
from harness.errors import HarnessError
from harness.kernels.benchfile import Bench, benches
from harness.planfile import read_plan
from harness.reports import kernel_times
from harness.reports.outcomes import Outcomes, outcomes_of
from harness.reports.statistics import Comparison, Verdict, compare, verdicts
from harness.results import CellResult
from harness.runfolder import CellFolder, RunFolder
from harness.store import Attempt
from harness.tables import Grid, number
from harness.tasks.measurement import Measurement, read_result

Place = tuple[str, str, str]
State = Literal["pass", "fail", "note"]

BITS = "bits_per_weight"
INTEGERS = "integers"
TIMES = ("quantize_seconds", "evaluate_seconds")
MARGINS: Mapping[str, float] = {
    "token_perplexity": 0.005,
    "word_perplexity": 0.005,
    "byte_perplexity": 0.005,
    "perplexity": 0.005,
    "bits_per_byte": 0.005,
    "kl_divergence": 0.005,
    "top1_agreement": 0.005,
    BITS: 0.0,
}
"""What counts as no difference unless said otherwise.

A fraction of the baseline's value for perplexities and KL divergence, which span orders of magnitude between settings;
in the metric's own units for the others.
"""
_FRACTIONS = ("kl_divergence",)  # statistics take perplexities' margins as fractions already
OTHER_MARGIN = 0.01  # accuracies
_MACHINE = ("processor", "processors", "threads", "memory_bytes", "gpus")


@dataclass(frozen=True)
class Check:
    """One thing of one cell that the gate looked at. ``comparison`` is there where samples were compared."""

    place: Place
    what: str
    state: State
    verdict: str
    detail: str = ""
    baseline: float | None = None
    candidate: float | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Gate:
    """All checks, and what the two runs do not have in common."""

    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state == "fail")

    def summary(self) -> str:
        """One line: how many checks failed, and in which cells."""
        cells = list(dict.fromkeys(" ".join(check.place) for check in self.failed))
        if not cells:
            return f"passed: {len(self.checks)} checks, no regression"
        return f"FAILED: {len(self.failed)} of {len(self.checks)} checks, in {'; '.join(cells)}"


@dataclass(frozen=True)
class _Run:
    """A run's cells by their place in its table."""

    folder: RunFolder
    cells: Mapping[Place, CellResult]
    benches: Sequence[Bench]

    @classmethod
    def load(cls, path: Path) -> _Run:
        folder, measured = RunFolder(path), benches(path)
        # A folder may hold measurements of kernels alone.
        found = results.load(path) if folder.plan.exists() or not measured else []
        return cls(folder, {result.cell.place: result for result in found}, measured)

    def terms(self) -> Mapping[str, str]:
        plan = read_plan(self.folder.plan)
        return plan.terms if plan else {}

    def machines(self) -> set[str]:
        """What the attempts of this run ran on, as JSON."""
        runs = store.read(self.folder.store).runs if self.folder.store.is_file() else []
        found = [json.loads(run.provenance) for run in runs]
        return {json.dumps({key: one.get(key) for key in _MACHINE}, sort_keys=True) for one in found}

    def outcomes(self, result: CellResult, task: str) -> dict[str, tuple[Outcomes | None, Measurement, str]]:
        """By metric: what can be compared, the measurement, and why it cannot be compared."""
        found = read_result(self.folder.cell(result.cell.id).tasks, task)
        if found is None:
            return {}
        whole = [one for one in found.measurements if "/" not in one.metric]
        by_metric: dict[str, tuple[Outcomes | None, Measurement, str]] = {}
        for measurement in whole or found.measurements:  # of a group its aggregates, of a tag its members
            try:
                by_metric[measurement.metric] = (outcomes_of(measurement, found.manifest), measurement, "")
            except HarnessError as error:
                by_metric[measurement.metric] = (None, measurement, error.what)
        return by_metric


def compare_runs(baseline: Path, candidate: Path, margins: Mapping[str, float]) -> Gate:
    """Compare every cell of the baseline. ``margins`` are laid over :data:`MARGINS`; times and integers are gated if
    they name them.

    Raises HarnessError where there is no run.
    """
    one, other = _Run.load(baseline), _Run.load(candidate)
    margins = {**MARGINS, **margins}
    checks = [check for result in one.cells.values() for check in _cell_checks(result, one, other, margins)]
    checks += _time_checks(one, other, margins)
    if kernel_times.SECONDS in margins:
        checks += _kernel_checks(one.benches, other.benches, margins[kernel_times.SECONDS])
    warnings = [
        f"{name}: {before} in the baseline, {after} in the candidate"
        for name, before in one.terms().items()
        if (after := other.terms().get(name)) != before
    ]
    return Gate(_decided(checks), tuple(warnings))


def _cell_checks(result: CellResult, one: _Run, other: _Run, margins: Mapping[str, float]) -> Iterator[Check]:
    place = result.cell.place
    counterpart = other.cells.get(place)
    before = result.last
    if before is None or before.status != "ok":
        status = before.status if before else "pending"
        yield Check(place, "status", "note", "skipped", f"{status} in the baseline")
        return
    if counterpart is None or counterpart.last is None:
        yield Check(place, "status", "fail", "missing", "the candidate has no result of this cell")
        return
    after = counterpart.last
    if after.status != "ok":
        yield Check(place, "status", "fail", after.status, after.reason or "")
        return
    yield _bits_check(place, before, after, margins[BITS])
    folders = one.folder.cell(result.cell.id), other.folder.cell(counterpart.cell.id)
    yield from _integer_check(place, *folders, gated=INTEGERS in margins)
    for task in result.cell.tasks:
        yield from _task_checks(place, task, one.outcomes(result, task), other.outcomes(counterpart, task), margins)


def _bits_check(place: Place, before: Attempt, after: Attempt, margin: float) -> Check:
    was, now = before.bits_per_weight, after.bits_per_weight
    if was is None or now is None:
        return Check(place, BITS, "note", "skipped", "not recorded")
    grown = now - was
    verdict: Verdict = "same" if abs(grown) <= margin + 1e-9 else "worse" if grown > 0 else "better"
    return Check(place, BITS, "fail" if verdict == "worse" else "pass", verdict, _signed(grown), was, now)


def _integer_check(place: Place, before: CellFolder, after: CellFolder, *, gated: bool) -> Iterator[Check]:
    """A cell's id is what decides its integers, so that others under one id come from the harness or the machine.

    Where it is asked for (``gated``) a method that was written anew has to give the integers of the old one, too.
    """
    same_id = before.path.name == after.path.name
    there = before.quantized.is_file(), after.quantized.is_file()
    if not (gated or same_id) or not any(there):  # full precision has none
        return
    state: State = "fail" if gated else "note"
    if not all(there):
        yield Check(place, INTEGERS, state, "missing", f"not kept in the {'candidate' if there[0] else 'baseline'}")
    elif filecmp.cmp(before.quantized, after.quantized, shallow=False):
        yield Check(place, INTEGERS, "pass", "same")
    else:
        what = "one method, one calibration, other integers: the quantizer or the machine changed"
        yield Check(place, INTEGERS, state, "changed", what if same_id else "the method or what it was given changed")


def _task_checks(
    place: Place,
    task: str,
    before: Mapping[str, tuple[Outcomes | None, Measurement, str]],
    after: Mapping[str, tuple[Outcomes | None, Measurement, str]],
    margins: Mapping[str, float],
) -> Iterator[Check]:
    for metric, (one, was, why) in before.items():
        what = f"{task} {metric}"
        if metric not in after:
            yield Check(place, what, "fail", "missing", "the candidate has no such number", was.value)
            continue
        other, now, why_not = after[metric]
        if one is None or other is None:
            yield Check(place, what, "note", "not compared", why or why_not, was.value, now.value)
            continue
        try:
            found = compare(one, other, margin=_margin(metric.rpartition("/")[2], one, margins))
        except HarnessError as error:
            yield Check(place, what, "fail", "not comparable", error.what, was.value, now.value)
            continue
        yield Check(place, what, "pass", "", "", was.value, now.value, found)


def _margin(metric: str, baseline: Outcomes, margins: Mapping[str, float]) -> float:
    margin = margins.get(metric, OTHER_MARGIN)
    return margin * abs(baseline.value) if metric in _FRACTIONS else margin


def _time_checks(one: _Run, other: _Run, margins: Mapping[str, float]) -> Iterator[Check]:
    """Each kind of time over all cells together, paired by cell: how much cells scatter is the noise it is held to."""
    asked = [name for name in TIMES if name in margins]
    if asked and one.machines() != other.machines():
        for name in asked:
            yield Check(_ALL, name, "note", "not compared", "the two runs had other machines or numbers of threads")
        return
    for name in asked:
        pairs = {
            place: (_seconds(result, name), _seconds(other.cells[place], name))
            for place, result in one.cells.items()
            if place in other.cells
        }
        known = {place: (was, now) for place, (was, now) in pairs.items() if was and now}
        if known:
            before, after = (_times(name, {place: pair[side] for place, pair in known.items()}) for side in (0, 1))
            found = compare(before, after, margin=margins[name])
            detail = f"geometric mean of {found.n} cells"
            yield Check(_ALL, name, "pass", "", detail, found.baseline, found.candidate, found)


_ALL: Place = ("all models", "all settings", "all methods")


def _seconds(result: CellResult, name: str) -> float | None:
    return getattr(result.last, name) if result.last and result.last.status == "ok" else None


def _times(name: str, seconds: Mapping[Place, float]) -> Outcomes:
    """Their geometric mean: a difference of it is relative, as slower machines and larger models need it."""
    total = np.log(np.fromiter(seconds.values(), dtype=np.float64))
    return Outcomes(name, total, np.ones_like(total), True, False, tuple(map(str, seconds)), {})


def _kernel_checks(one: Sequence[Bench], other: Sequence[Bench], margin: float) -> Iterator[Check]:
    """Every path, layer shape and number of tokens that the baseline was timed at, device by device."""
    if not one:
        yield Check(_ALL, kernel_times.SECONDS, "note", "skipped", "the baseline has no measurements of kernels")
    for bench in one:
        counterpart = next((found for found in other if found.device == bench.device), None)
        if counterpart is not None and not kernel_times.same_machine(bench, counterpart):
            detail = "the two were timed on other machines, or on other parts of one"
            yield Check(_ALL, kernel_times.SECONDS, "note", "not compared", detail)
            continue
        for was, now in kernel_times.paired(bench, counterpart):
            place = ("kernels", was.setting, bench.device)
            what = f"{kernel_times.SECONDS} {was.outputs}×{was.inputs}, {was.tokens} tokens"
            if now is None:
                yield Check(place, what, "fail", "missing", "the candidate was not timed", was.path.median)
                continue
            found = kernel_times.compare_times(was, now, margin)
            detail = "" if was.operator == now.operator else f"{was.operator} became {now.operator}"
            yield Check(place, what, "pass", "", detail, found.baseline, found.candidate, found)


def _decided(checks: Sequence[Check]) -> tuple[Check, ...]:
    """Verdicts of all comparisons together."""
    found = iter(verdicts([check.comparison for check in checks if check.comparison]))
    decided = []
    for check in checks:
        if check.comparison:
            verdict = next(found)
            detail = _difference(check.comparison) + (f" ({check.detail})" if check.detail else "")
            check = replace(check, verdict=verdict, detail=detail, state="fail" if verdict == "worse" else "pass")
        decided.append(check)
    return tuple(decided)


def grids(gate: Gate) -> list[Grid]:
    """A table per model; what failed on top."""
    header = ("setting", "method", "check", "baseline", "candidate", "difference [95 %]", "verdict", "")
    models = list(dict.fromkeys(check.place[0] for check in gate.checks))
    ordered = sorted(gate.checks, key=lambda check: ("fail", "note", "pass").index(check.state))
    return [Grid(model, header, tuple(_row(check) for check in ordered if check.place[0] == model)) for model in models]


def _row(check: Check) -> tuple[str, ...]:
    _, setting, label = check.place
    values = (number(value) if value is not None else "–" for value in (check.baseline, check.candidate))
    return (setting, label, check.what, *values, check.detail, check.verdict, check.state.upper())


def _difference(comparison: Comparison) -> str:
    def shown(value: float) -> str:
        return f"{100 * value:+.2f} %" if comparison.relative else _signed(value)

    interval = comparison.interval
    ends = f" [{shown(interval.low)}, {shown(interval.high)}]" if interval else f" [too few: {comparison.n}]"
    return shown(comparison.difference) + ends


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def read_margins(texts: Sequence[str]) -> dict[str, float]:
    """``token_perplexity=0.01`` as numbers. Raises HarnessError for anything else."""
    margins = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            margins[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not 0 <= margins[name] < math.inf:
            raise HarnessError(f"{text!r} is no margin", fix="write metric=number: token_perplexity=0.01,acc=0.02")
    return margins


def facts(gate: Gate) -> list[dict[str, Any]]:
    """One object per check, for programs."""
    return [
        {
            "model": check.place[0], "setting": check.place[1], "method": check.place[2], "check": check.what,
            "baseline": check.baseline, "candidate": check.candidate, "state": check.state,
            "verdict": check.verdict, "detail": check.detail,
            "p_value": check.comparison.p_value if check.comparison else None,
        }
        for check in gate.checks
    ]  # fmt: skip
