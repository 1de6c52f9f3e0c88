"""What tables and pages of a very large run cost: ten models, 1,000 cells each, 12 tasks.

    python -P benchmarks/reports_speed.py

Each command is a fresh process. Seconds are those of the processor, so that what else the machine does is left out;
on an idle one they are the time that passes, since every command keeps to one thread. Exits with 1 past a limit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from harness.cells import Cell
from harness.planfile import ModelFacts, Plan, write_plan
from harness.store import Attempt, Measured, Run, Store

WHEN = "2026-01-01T00:00:00+00:00"
METHODS = ("rtn", "gptq", "adadim", "duquant", "cbq")
SETTINGS = tuple(f"W{weights}A{activations}" for weights, activations in product((2, 3, 4, 8), (4, 8, 16)))
TASKS = tuple(f"task{number}" for number in range(12))
MB = 10**6


@dataclass(frozen=True)
class Limit:
    """A command, and the processor seconds and bytes that it may take."""

    words: tuple[str, ...]
    seconds: float
    bytes: int = 500 * MB


LIMITS = (
    Limit(("results", "RUN"), 1),
    Limit(("results", "RUN", "--format", "json"), 1),
    Limit(("report", "RUN", "--format", "html", "--to", "OUT/report.html"), 10),
    Limit(("report", "RUN", "--out", "OUT/report"), 10),
    Limit(("leaderboard", "RUN", "--out", "OUT/site"), 20),
)


def make_run(path: Path, cells_of_a_model: int, models: int = 10) -> Path:
    """A run folder with a store alone: numbers out of the air, the same ones every time."""
    cells = [cell for model in range(models) for cell in model_cells(model, cells_of_a_model)]
    facts = {cell.model: ModelFacts(Path("/models"), cell.weights_sha256, "c" * 64) for cell in cells}
    path.mkdir(parents=True)
    terms = {"calibration": "pydoc:4x64", "seed": "0", "dtype": "float32", "device": "cpu"}
    write_plan(path / "plan.json", Plan(terms, facts, tuple(cells)))
    rng = random.Random(0)
    store = Store(path / "run.sqlite")
    store.begin(Run(WHEN, "{}", "{}"))
    store.add_measured([
        Measured(cell.id, task, "acc", rng.random(), 0.01, 1000, 1, 1.0, WHEN) for cell in cells for task in cell.tasks
    ])  # fmt: skip
    for cell in cells:
        store.add_attempt(Attempt(cell.id, 1, 1, "ok", None, 0, 1.0, 2.0, 3.0, 10**9, 4.25, 10**8, WHEN))
    store.close()
    return path


def model_cells(model: int, count: int) -> list[Cell]:
    """Full precision, then methods with a number as their option, at every setting."""
    first = Cell(
        model=f"model-{model}", model_path="/models", weights_sha256=f"{model:064x}", method="fp", method_source="fp",
        method_sha256="b" * 64, options={}, setting="W16A16", dtype="float32", device="cpu", seed=0,
        calibration="pydoc:4x64", calibration_sha256=None, tasks=TASKS, data_root=None,
    )  # fmt: skip
    others = product(range(count), SETTINGS, METHODS)
    return [first] + [
        replace(first, method=method, setting=setting, options={"damp": at / 100}, calibration_sha256="c" * 64)
        for (at, setting, method), _ in zip(others, range(count - 1), strict=False)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000, help="of each of ten models")
    parser.add_argument("--run", type=Path, help="keep the run folder here, and use the one that is there")
    arguments = parser.parse_args()
    late = 0
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or Path(folder) / "run"
        if not run.exists():
            make_run(run, arguments.cells)
        print("| command | processor seconds | of them the system's | seconds | peak memory | limit |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for limit in LIMITS:
            words = [word.replace("RUN", str(run)).replace("OUT", folder) for word in limit.words]
            seconds, system, passed, peak = cost(words)
            late += seconds > limit.seconds or peak > limit.bytes
            shown = " ".join(limit.words).replace("OUT/", "")
            print(
                f"| `harness {shown}` | {seconds:.2f} | {system:.2f} | {passed:.1f} | {peak / MB:.0f} MB "
                f"| {limit.seconds:g} s |",
                flush=True,
            )
    return int(late > 0)


def cost(words: list[str]) -> tuple[float, float, float, int]:
    """(processor seconds, those of them of the system, seconds, peak bytes) of one command of the harness."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-P", "-m", "harness", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"harness {' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    system = usage.ru_stime
    return usage.ru_utime + system, system, time.perf_counter() - start, usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
