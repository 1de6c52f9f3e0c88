"""Rows that cannot be: refused by the store, and every possible one taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import store
from harness.endings import STATUSES
from harness.errors import BadOutput
from harness.store import Attempt, Measured, Store

WHEN = "2026-01-01T00:00:00+00:00"
Row = TypeVar("Row", Measured, Attempt)
NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-(2**53), 2**53), st.none(), st.text(max_size=3),
    st.sampled_from([2**63, 2**70, 0.0, -0.0, 0.5, 1.0, 1.5, 20.5, 1e308, -1e-300, -1, 0, 1, 2]),
)  # fmt: skip
WORDS = st.one_of(st.sampled_from([*STATUSES, "fine", "", "OK"]), st.text(max_size=5), st.none(), st.integers(0, 3))
CELLS = st.sampled_from(["0123456789abcdef", "short", "", "0123456789ABCDEF", None])
METRICS = st.sampled_from(["acc", "acc_norm", "token_perplexity", "kl", "", None])
ROW = Measured("0123456789abcdef", "pydoc", "acc", 0.5, 0.01, 100, 1, 1.5, WHEN)
END = Attempt("0123456789abcdef", 1, 1, "ok", None, 0, 1.0, 2.0, 3.0, 10**9, 4.25, 10**8, WHEN)
OF_A_ROW = {"cell": CELLS, "metric": METRICS} | dict.fromkeys(
    ("value", "stderr", "n", "higher_is_better", "seconds"), NUMBERS
)
OF_AN_END = {"cell": CELLS, "status": WORDS, "reason": st.one_of(st.none(), st.text(max_size=3))} | dict.fromkeys(
    ("run", "returncode", "load_seconds", "quantize_seconds", "evaluate_seconds", "peak_memory_bytes",
     "bits_per_weight", "packed_bytes"), NUMBERS,
)  # fmt: skip


def changed(sound: Row, strategies: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Row]:
    """A sound row with up to three values that may well be impossible."""
    return st.sets(st.sampled_from(sorted(strategies)), max_size=3).flatmap(
        lambda names: st.fixed_dictionaries({name: strategies[name] for name in sorted(names)}).map(
            lambda values: sound._replace(**values)
        )
    )


def _is_number(value: object, least: float = float("-inf"), most: float = 1.7e308) -> bool:
    return isinstance(value, int | float) and least <= value <= most


def _possible(row: Measured) -> bool:
    bounds = {"acc": (0, 1.001), "acc_norm": (0, 1.001), "token_perplexity": (0.999, 1.7e308)}
    least, most = bounds.get(row.metric, (-1.7e308, 1.7e308))
    return (
        row.cell is not None and len(row.cell) == 16 and bool(row.metric) and _is_number(row.value, least, most)
        and (row.stderr is None or _is_number(row.stderr, 0)) and _is_number(row.n, 0)
        and row.higher_is_better in (0, 1) and _is_number(row.seconds, 0)
    )  # fmt: skip


def _possible_end(row: Attempt) -> bool:
    amounts = (
        row.load_seconds, row.quantize_seconds, row.evaluate_seconds, row.peak_memory_bytes, row.bits_per_weight,
        row.packed_bytes,
    )  # fmt: skip
    return (
        row.status in STATUSES and (row.status == "ok") == (row.reason is None) and row.cell is not None
        and _is_number(row.run, 1) and all(value is None or _is_number(value, 0) for value in amounts)
    )  # fmt: skip


@pytest.mark.fault(34)
def test_34_impossible_rows_are_refused(tmp_path: Path, long: bool, figure) -> None:
    """What the store takes is possible, and comes back as it was given; the rest leaves no trace."""
    recording, path = Store(tmp_path / "run.sqlite"), tmp_path / "run.sqlite"
    counts = {"taken": 0, "refused": 0}
    taken: dict[str, list[Any]] = {"measured": [], "attempts": []}

    @settings(max_examples=5000 if long else 250, deadline=None, database=None)
    @given(changed(ROW, OF_A_ROW), changed(END, OF_AN_END))
    def examine(row: Measured, end: Attempt) -> None:
        row = row._replace(task=str(sum(counts.values())))
        end = end._replace(attempt=sum(counts.values()) + 1)
        for add, value, kind, possible in (
            (recording.add_measured, [row], "measured", _possible(row)),
            (recording.add_attempt, end, "attempts", _possible_end(end)),
        ):
            try:
                add(value)
            except (BadOutput, TypeError):
                counts["refused"] += 1
                assert repr(value) != repr([ROW._replace(task=row.task)])
                assert repr(value) != repr(END._replace(attempt=end.attempt))
            else:
                counts["taken"] += 1
                assert possible, value
                taken[kind].append(row if kind == "measured" else end)

    examine()
    recording.close()
    found = store.read(path)
    assert found.measured == taken["measured"]
    assert found.attempts == taken["attempts"]
    assert min(counts.values()) > sum(counts.values()) / 20
    figure(
        34,
        f"{sum(counts.values()):,} generated rows: {counts['refused']:,} refused, {counts['taken']:,} taken, none of "
        "which was impossible",
    )
