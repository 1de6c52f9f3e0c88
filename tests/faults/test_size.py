"""Very many cells and very many methods: what they cost to plan, record and print."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from faults.quick import Quick
from made_runs import CELL

from harness.planfile import Plan, write_plan
from harness.store import Measured, Store

WHEN = "2026-01-01T00:00:00+00:00"


@pytest.mark.fault(35)
def test_35_very_many_cells(tmp_path: Path, long: bool, figure) -> None:
    """Ten times the rows: as many times the seconds at the most, and no more memory than the rows themselves take."""
    tasks = tuple(f"t{n}" for n in range(12))
    costs = []
    for count in (1000, 10_000) if long else (200, 2000):
        run = tmp_path / str(count)
        cells = tuple(replace(CELL, seed=seed, tasks=tasks) for seed in range(count))
        write_plan(run / "plan.json", Plan({}, {}, cells))
        recording = Store(run / "run.sqlite")
        recording.add_measured([Measured(c.id, t, "acc", 0.5, 0.01, 9, 1, 1.0, WHEN) for c in cells for t in tasks])
        recording.close()
        costs.append((count * len(tasks), *_costs("results", str(run), "--format", "json")))
    (few, few_seconds, few_bytes), (many, seconds, peak) = costs
    a_row = (peak - few_bytes) / (many - few)
    assert seconds < 1 + 10 * few_seconds
    assert a_row < 3000
    size = (run / "run.sqlite").stat().st_size
    figure(
        35,
        f"{count:,} cells, {many:,} rows, {size / 1e6:.0f} MB: printed in {seconds:.1f} s of processor time, "
        f"{peak / 1e6:.0f} MB at most, {a_row:,.0f} bytes a row",
    )


@pytest.mark.fault(35)
def test_35_very_many_methods(quick: Quick, tmp_path: Path, figure) -> None:
    """None of them is imported to be listed; one of them would never return."""
    plain = (Path(__file__).parents[2] / "methods" / "rtn.py").read_text()
    for n in range(50):
        (tmp_path / f"mine{n}.py").write_text(plain.replace('"rtn"', f'"mine{n}"') + "\nwhile True: pass" * (n == 7))
    methods = ",".join(str(path) for path in sorted(tmp_path.glob("mine*.py")))
    words = ["run", "--methods", methods, "--models", str(quick.model), "--settings", "W4A16", "--dry-run"]
    seconds, peak = _costs(*words)
    assert seconds < 5
    assert peak < 200e6
    figure(35, f"50 methods planned in {seconds:.1f} s of processor time, {peak / 1e6:.0f} MB")


COSTS = """
import sys, time
from harness import processes
from harness.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
sys.stderr.write(f"{time.process_time()} {processes.peak_resident_bytes()}")
"""


def _costs(*words: str) -> tuple[float, int]:
    """Processor seconds and the most memory of a command in a process of its own, as it says itself.

    What the system says of a child begins with the memory of the process that it was forked from.
    """
    command = [sys.executable, "-P", "-c", COSTS, *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds, peak = done.stderr.split()[-2:]
    return float(seconds), int(peak)
