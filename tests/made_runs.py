"""Run folders of real results (``stores/``: the demo's, DuQuant's of the demo, WikiText-2), and made-up ones."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from harness.cells import Cell
from harness.planfile import ModelFacts, Plan, write_plan
from harness.store import Attempt, Measured, Run, Store

STORES = Path(__file__).parent / "reports" / "stores"
DEMO, DUQUANT, KNOWN = STORES / "demo", STORES / "demo-duquant", STORES / "known"
README = STORES / "readme"  # the demo that the README shows
WHEN = "2026-01-01T00:00:00+00:00"
HOSTILE = (
    "<script>alert(1)</script>", "a|b\\c", "=cmd()", "x" * 300, "\u202eright to left \u05d0\u05d1",
    "$\\input{/etc/passwd}$",
    "[red]", "a\nb", "'\"&", "{{ 7 * 7 }}", "</script><img src=x onerror=alert(1)>", "@SUM(1)", "%s{}", "\x1b[31m",
)  # fmt: skip
CELL = Cell(
    model="tiny", model_path="/m", weights_sha256="a" * 64, method="gptq", method_source="gptq",
    method_sha256="b" * 64, options={}, setting="W4A16", dtype="float32", device="cpu", seed=0,
    calibration="pydoc:4x64", calibration_sha256="c" * 64, tasks=("piqa", "boolq", "pydoc"), data_root=None,
)  # fmt: skip
FP = replace(CELL, method="fp", setting="W16A16", calibration_sha256=None)
Numbers = dict[str, tuple[float, float | None]]


def make_run(path: Path, rows: Sequence[tuple[Cell, Numbers, str]]) -> Path:
    """Write a run folder of (cell, {task: (value, standard error)}, status); pydoc and wikitext2 are perplexities."""
    path.mkdir(parents=True)
    cells = tuple(cell for cell, _, _ in rows)
    terms = {"calibration": CELL.calibration, "seed": "0", "dtype": "float32", "device": "cpu"}
    calibrated = next((cell.calibration_sha256 for cell in cells if cell.calibration_sha256), None)
    facts = {cell.model: ModelFacts(Path("/m"), cell.weights_sha256, calibrated) for cell in cells}
    write_plan(path / "plan.json", Plan(terms, facts, cells))
    store = Store(path / "run.sqlite")
    store.begin(Run(WHEN, "{}", "{}"))
    for cell, numbers, status in rows:
        store.add_measured([_measured(cell, task, *number) for task, number in numbers.items()])
        if status != "pending":
            reason = None if status == "ok" else "<b>=why()"
            store.add_attempt(Attempt(cell.id, 1, 1, status, reason, 0, 1.0, 2.0, 3.0, 10**9, 4.25, 10**8, WHEN))
    store.close()
    return path


def _measured(cell: Cell, task: str, value: float, stderr: float | None) -> Measured:
    text = task.partition(":")[0] in ("pydoc", "wikitext2")
    metric = "token_perplexity" if text else "acc"
    return Measured(cell.id, task, metric, value, stderr, 1000, int(not text), 1.0, WHEN)


def processor_seconds(work: Callable[[], object]) -> float:
    """The best of three: neither what else the machine does nor what earlier tests left in memory."""
    seconds = []
    for _ in range(3):
        gc.collect()
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)
