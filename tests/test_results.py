"""Rows and tables of a run, made by hand."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from made_runs import processor_seconds
from rich.console import Console

from harness import results, tables
from harness.cells import Cell
from harness.planfile import ModelFacts, Plan, write_plan
from harness.store import Attempt, Measured, Store

CELL = Cell(
    model="tiny", model_path="/models/tiny", weights_sha256="a" * 64, method="gptq", method_source="gptq",
    method_sha256="b" * 64, options={"damp": 0.05, "act_order": False}, setting="W4A16g64", dtype="float32",
    device="cpu", seed=0, calibration="pydoc:4x64", calibration_sha256="c" * 64, tasks=("pydoc",), data_root=None,
)  # fmt: skip
BASELINE = replace(CELL, method="fp", options={}, setting="W16A16", tasks=("pydoc", "piqa"))
GOOD = replace(CELL, tasks=("pydoc", "piqa"))
FAILED = replace(CELL, setting="W2A16", tasks=("pydoc", "piqa"))
WAITING = replace(CELL, setting="W3A16", tasks=("pydoc",))
WHEN = "2026-01-01T00:00:00+00:00"


def ended(cell: Cell, number: int, status: str, reason: str | None) -> Attempt:
    return Attempt(cell.id, number, 1, status, reason, 0, 1.0, 2.0, 3.0, 10**9, 4.25, 10**8, WHEN)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    terms = {"calibration": "pydoc:4x64", "seed": "0", "dtype": "float32", "device": "cpu"}
    facts = {"tiny": ModelFacts(Path("/m"), "a" * 64, "c" * 64)}
    write_plan(tmp_path / "plan.json", Plan(terms, facts, (BASELINE, GOOD, WAITING, FAILED)))
    store = Store(tmp_path / "run.sqlite")
    for cell, value in ((GOOD, 27.25), (BASELINE, 20.5), (FAILED, 1e6)):  # not in the order of the plan
        store.add_measured([Measured(cell.id, "pydoc", "token_perplexity", value, 0.5, 16, 0, 1.0, WHEN)])
    for cell in (BASELINE, GOOD):
        store.add_measured([
            Measured(cell.id, "piqa", "acc", 0.5, None, 100, 1, 2.0, WHEN),
            Measured(cell.id, "piqa", "acc_norm", 0.625, 0.01, 100, 1, 2.0, WHEN),
        ])  # fmt: skip
    store.add_attempt(ended(BASELINE, 1, "ok", None))
    store.add_attempt(ended(GOOD, 1, "interrupted", "the run was stopped"))
    store.add_attempt(ended(GOOD, 2, "ok", None))
    store.add_attempt(ended(FAILED, 1, "bad_output", "=cmd() | <b>"))
    store.add_attempt(ended(replace(CELL, setting="W8A8"), 1, "ok", None))  # of a plan that is no more
    store.close()
    return tmp_path


def test_measurements_come_in_the_order_of_the_plan(run: Path) -> None:
    rows = list(results.measurement_rows(results.load(run)))
    assert [(row["cell"], row["task"], row["metric"], row["value"], row["status"]) for row in rows] == [
        (BASELINE.id, "pydoc", "token_perplexity", 20.5, "ok"), (BASELINE.id, "piqa", "acc", 0.5, "ok"),
        (BASELINE.id, "piqa", "acc_norm", 0.625, "ok"), (GOOD.id, "pydoc", "token_perplexity", 27.25, "ok"),
        (GOOD.id, "piqa", "acc", 0.5, "ok"), (GOOD.id, "piqa", "acc_norm", 0.625, "ok"),
        (FAILED.id, "pydoc", "token_perplexity", 1e6, "ok"), (FAILED.id, "piqa", None, None, "bad_output"),
    ]  # fmt: skip
    assert all(tuple(row) == results.MEASUREMENT_KEYS for row in rows)
    assert rows[3]["options"] == {"act_order": False, "damp": 0.05}


def test_cells_show_their_last_attempt(run: Path) -> None:
    rows = list(results.cell_rows(results.load(run), run))
    assert [(row["cell"], row["status"]) for row in rows] == [
        (BASELINE.id, "ok"), (GOOD.id, "ok"), (FAILED.id, "bad_output"),
    ]  # fmt: skip
    assert all(tuple(row) == results.CELL_KEYS for row in rows)
    assert rows[1]["evaluate_seconds"] == 6.0  # of both attempts
    assert rows[1]["artifact"] is None
    assert results.unfinished(results.load(run)) == 1


def test_json_is_an_array_with_a_row_a_line(run: Path) -> None:
    rows = list(results.measurement_rows(results.load(run)))
    tricky = {**rows[0], "reason": '}, {"cell": "x', "model": "ü\n"}
    stream = io.StringIO()
    results.write_json([tricky, *rows], stream)
    assert json.loads(stream.getvalue()) == [tricky, *rows]
    assert len(stream.getvalue().splitlines()) == len(rows) + 3
    empty = io.StringIO()
    results.write_json([], empty)
    assert json.loads(empty.getvalue()) == []


def test_csv_defuses_formulas(run: Path) -> None:
    stream = io.StringIO()
    results.write_csv(results.measurement_rows(results.load(run)), results.MEASUREMENT_KEYS, stream)
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert len(rows) == 8
    assert rows[-1]["reason"] == "'=cmd() | <b>"
    assert rows[-1]["value"] == ""
    assert rows[3]["options"] == '{"act_order":false,"damp":0.05}'


def test_tables_show_a_number_or_a_word_in_every_place(run: Path) -> None:
    (grid,) = tables.score_grids(results.load(run))
    assert grid.header == ("method", "setting", "bits/weight", "pydoc token_perplexity ↓", "piqa acc ↑")
    label = "gptq:act_order=false:damp=0.05"
    assert grid.rows == (
        ("fp", "W16A16", "4.25", "20.50 ± 0.5000", "0.5000"),
        (label, "W4A16g64", "4.25", "27.25 ± 0.5000", "0.5000"),
        (label, "W3A16", "–", "pending", "not asked"),
        (label, "W2A16", "4.25", "1e+06 ± 0.5000", "bad_output"),
    )
    (cells,) = tables.cell_grids(results.load(run))
    assert cells.rows[2][3] == "pending"
    assert cells.rows[3][-1] == "=cmd() | <b>"


def test_markdown_and_terminal_escape_names(run: Path) -> None:
    grids = tables.cell_grids(results.load(run))
    text = tables.markdown(grids)
    assert r"=cmd() \| \<b\>" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1
    hostile = replace(grids[0], model="[red]x[/red]", rows=(("[bold]", *grids[0].rows[0][1:]),))
    console = Console(file=io.StringIO(), width=200)
    console.print(tables.rendered([hostile]))
    assert "[red]x[/red]" in console.file.getvalue()
    assert "[bold]" in console.file.getvalue()


def test_a_run_that_has_not_measured_yet_can_be_read(run: Path) -> None:
    (run / "run.sqlite").unlink()
    found = results.load(run)
    assert list(results.measurement_rows(found)) == []
    assert results.unfinished(found) == 4
    assert tables.score_grids(found)[0].rows[0][3] == "pending"


def test_reading_a_run_takes_as_long_as_it_is_large(tmp_path: Path) -> None:
    """Five times the cells, at most ten times the time; benchmarks/reports_speed.py has the seconds."""
    seconds = {}
    for count in (200, 1000):
        run = tmp_path / str(count)
        run.mkdir()
        cells = tuple(replace(CELL, seed=seed, tasks=tuple(f"t{n}" for n in range(12))) for seed in range(count))
        write_plan(run / "plan.json", Plan({}, {}, cells))
        store = Store(run / "run.sqlite")
        store.add_measured([Measured(c.id, t, "acc", 0.5, 0.01, 9, 1, 1.0, WHEN) for c in cells for t in c.tasks])
        store.close()
        stream = io.StringIO()
        seconds[count] = processor_seconds(partial(_write_measurements, run, stream))
        assert stream.getvalue().count("\n") == 3 * (12 * count + 2)
    assert seconds[1000] < 10 * seconds[200]


def _write_measurements(run: Path, stream: IO[str]) -> None:
    results.write_json(results.measurement_rows(results.load(run)), stream)


@pytest.mark.parametrize("format", ["markdown", "csv", "json"])
def test_what_is_printed_can_be_written_to_a_file(run: Path, tmp_path: Path, format: str) -> None:
    words = [sys.executable, "-P", "-m", "harness", "results", str(run), "--format", format]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    subprocess.run([*words, "--to", str(tmp_path / "table")], check=True)
    assert (tmp_path / "table").read_text() == printed
    assert "gptq" in printed
