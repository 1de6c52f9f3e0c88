"""Measured kernels in reports and in the gate, from synthetic samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.errors import HarnessError
from harness.kernels.benchfile import IN_A_GRAPH, Bench, Samples, Timing, benches
from harness.reports import kernel_plots, kernel_tables
from harness.reports.compare import compare_runs
from harness.reports.kernel_plots import crossovers
from harness.reports.kernel_times import SECONDS, compare_times
from harness.reports.report import Report
from harness.reports.statistics import verdicts

MARGIN = {SECONDS: 0.02}
NOISE = 0.01  # standard deviation of a round's seconds, beyond what all calls of the round share


def timing(tokens: int, seed: int, *, slower: float = 1.0, speed: float = 1.0, rounds: int = 9) -> Timing:
    """A path of 3 ms per token against a float product of 4 ms and 1 ms per token, on a machine that wanders."""
    generator = np.random.default_rng(seed)
    machine = speed * np.exp(np.cumsum(0.05 * generator.standard_normal(rounds)))

    def taken(milliseconds: float) -> Samples:
        noise = np.exp(NOISE * generator.standard_normal(rounds))
        return Samples(tuple(map(float, 1e-3 * milliseconds * machine * noise)))

    samples = {"path": taken(3 * tokens * slower), "operator": taken(3 * tokens), "float32": taken(4 + tokens)}
    return Timing(
        "W4A16g128", "an operator", 4096, 4096, tokens, 1e-3, 9e6 + 16384 * tokens, 3.4e7 * tokens, 9e9, 5e10, samples
    )


def bench(seed: int, name: str = "a processor", **kind: float) -> Bench:
    rows = tuple(timing(tokens, seed + tokens, **kind) for tokens in (1, 2, 4, 16, 64, 256))  # type: ignore[arg-type]
    return Bench("2026-01-01T00:00:00+00:00", "cpu", name, {"processor": name}, rows)


def gated(one: Bench, other: Bench, folder: Path):
    for name, found in {"one": one, "other": other}.items():
        found.write(folder / name)
    return compare_runs(folder / "one", folder / "other", MARGIN)


def test_the_file_gives_back_every_sample(tmp_path: Path) -> None:
    written = bench(0)
    written.write(tmp_path)
    assert benches(tmp_path) == [written]
    path = tmp_path / "bench-cpu.json"
    path.write_text(path.read_text().replace('"path": [', '"other": ['))
    with pytest.raises(HarnessError, match="no measurements of kernels"):
        benches(tmp_path)


def test_equal_kernels_pass_though_the_machine_wanders(tmp_path: Path) -> None:
    """200 pairs of runs, each of six comparisons, on a machine up to three times as slow the second time."""
    false = 0
    for seed in range(200):
        pairs = zip(bench(1000 * seed).timings, bench(1000 * seed + 500, speed=1 + seed / 100).timings, strict=True)
        false += "worse" in verdicts([compare_times(was, now, MARGIN[SECONDS]) for was, now in pairs])
    assert false <= 2
    assert not gated(bench(1), bench(2, speed=3), tmp_path).failed


def test_a_slowdown_of_five_percent_is_caught(tmp_path: Path) -> None:
    caught = 0
    for seed in range(50):
        pairs = zip(bench(1000 * seed).timings, bench(1000 * seed + 500, slower=1.05).timings, strict=True)
        caught += "worse" in verdicts([compare_times(was, now, MARGIN[SECONDS]) for was, now in pairs])
    assert caught >= 49
    gate = gated(bench(1), bench(2, slower=1.05), tmp_path)
    assert gate.failed and {check.place for check in gate.failed} == {("kernels", "W4A16g128", "cpu")}


def test_the_interval_holds_the_planted_change() -> None:
    held = 0
    for seed in range(200):
        found = compare_times(timing(4, seed), timing(4, seed + 5000, slower=1.03), 0.0)
        assert found.interval is not None
        held += found.interval.low <= 0.03 <= found.interval.high
    assert 0.9 * 200 <= held <= 0.99 * 200


def test_what_was_not_timed_fails_and_another_machine_is_not_compared(tmp_path: Path) -> None:
    one = bench(0)
    fewer = Bench(one.created, one.device, one.device_name, one.machine, one.timings[:-1])
    (missing,) = gated(one, fewer, tmp_path).failed
    assert missing.verdict == "missing" and "256 tokens" in missing.what
    elsewhere = gated(one, bench(0, name="another"), tmp_path)
    assert [check.verdict for check in elsewhere.checks] == ["not compared"]


def test_crossovers_lie_where_both_take_as_long() -> None:
    """3 t = 4 + t at two tokens; the noise moves it."""
    (at,) = crossovers([timing(tokens, tokens) for tokens in (1, 3, 16)], "float32")
    assert at == pytest.approx(2, rel=0.1)
    assert crossovers([timing(tokens, tokens) for tokens in (4, 16)], "float32") == []


def test_a_report_of_kernels_alone(tmp_path: Path) -> None:
    bench(0).write(tmp_path / "run")
    report = Report.of([tmp_path / "run"])
    written = {path.name for path in report.write(tmp_path / "out")}
    assert {"latency-W4A16g128.svg", "latency-W4A16g128.png", "roofline.svg", "roofline.png", "kernels.md"} <= written
    shown = (tmp_path / "out" / "latency-W4A16g128.svg").read_text()
    assert "= float32 at" in shown and "4096×4096" in shown
    assert "latency-W4A16g128.svg" in (tmp_path / "out" / "report.html").read_text()
    table = (tmp_path / "out" / "kernels.md").read_text()
    assert "a processor" in table and "an operator" in table
    again = dict(kernel_plots.draw([bench(0)], tmp_path / "again"))
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in again)


def test_a_table_row_says_what_was_measured() -> None:
    (grid,) = kernel_tables.grids([bench(0)])
    row = dict(zip(grid.header, grid.rows[0], strict=True))
    assert row["tokens"] == "1" and row["phase"] == "decode" and row["n"] == "9"
    assert float(row["× float32"]) == pytest.approx(5 / 3, rel=0.05)
    assert row["input quantized µs"] == "–"


def test_calls_in_a_graph_are_set_beside_float_products_in_one() -> None:
    found = bench(0)
    graphed = {"path" + IN_A_GRAPH: Samples((1e-3,) * 9), "float32" + IN_A_GRAPH: Samples((3e-3,) * 9)}
    first = replace(found.timings[0], samples={**found.timings[0].samples, **graphed})
    (grid,) = kernel_tables.grids([replace(found, timings=(first, *found.timings[1:]))])
    with_graph, without = (dict(zip(grid.header, row, strict=True)) for row in grid.rows[:2])
    assert with_graph["in a graph, warm µs"] == "1000" and with_graph["× float32 in a graph"] == "3.00"
    assert without["in a graph, warm µs"] == without["× float32 in a graph"] == "–"
    assert float(with_graph["× float32"]) == pytest.approx(5 / 3, rel=0.05)  # cold, with its launches: as before
