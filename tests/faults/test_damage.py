"""Files that are not as they were written: noticed, or without a meaning; never read as something else."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from faults.boundaries import Nobody
from faults.damage import all_different
from faults.quick import Quick, left_behind, results, statuses, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import CELL

from harness import store
from harness.endings import STATUSES
from harness.errors import BadOutput, HarnessError
from harness.executors.local import LocalExecutor
from harness.limits import Limits
from harness.planfile import Plan, read_plan, write_plan
from harness.runfolder import RunFolder
from harness.store import Attempt, Measured, Run, Store

WHEN = "2026-01-01T00:00:00+00:00"
Row = TypeVar("Row", Measured, Attempt)


@pytest.fixture(scope="module")
def finished(quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = quick.planned(tmp_path_factory.mktemp("finished") / "run")
    assert quick.run(out).returncode == 0
    return out


@pytest.fixture(scope="module")
def killed(quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose store is in good part still in its log: a reader kept it there until all was killed."""
    out = quick.planned(tmp_path_factory.mktemp("killed") / "run")
    run = quick.start(out, behave={"step_seconds": 0.2})
    wait_for(lambda: RunFolder(out).store.exists() and statuses(out).get("W16A16") == "ok")
    reader = sqlite3.connect(RunFolder(out).store)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM attempts").fetchone()
    wait_for(lambda: statuses(out).get("W4A16") == "ok")
    run.kill()
    run.communicate()
    wait_for(lambda: not left_behind(out))
    log = Path(f"{RunFolder(out).store}-wal")
    assert log.stat().st_size > 4096
    for name in ("run.sqlite", "run.sqlite-wal"):  # closing the reader would fold the log in
        shutil.copy(out / name, out / f"{name}.kept")
    reader.close()
    for name in ("run.sqlite", "run.sqlite-wal"):
        (out / f"{name}.kept").replace(out / name)
    return out


def recorded_again(out: Path) -> list[dict[str, object]]:
    """What the results are after the supervisor has compared the store with the cells; no cell is run."""
    from harness.supervisor import Supervisor

    folder = RunFolder(out)
    plan = read_plan(folder.plan)
    assert plan is not None
    with folder.claimed() as claim:
        start = lambda: Run(WHEN, "{}", "{}")  # noqa: E731
        Supervisor(claim, plan.cells, (), LocalExecutor(folder, Limits()), 1, Nobody(), start, False).run()
    return results(out)


@pytest.mark.fault(9)
def test_09_no_damage_to_a_store_is_silent(finished: Path, tmp_path: Path, long: bool, figure) -> None:
    """With the checksum that closing leaves, every mutation is refused. A store that was never closed has none.

    It is then read row by row: what is read is all that was written, or its beginning (a table cut at its end is a
    whole table; the cells' folders have the rest), or an error. ``integrity_check`` alone lets a tenth through.
    """
    closed, killed = tmp_path / "closed" / "run.sqlite", tmp_path / "killed" / "run.sqlite"
    for path in (closed, killed):
        path.parent.mkdir()
    shutil.copy(finished / "run.sqlite.sha256", closed.parent)
    whole, before = RunFolder(finished).store.read_bytes(), store.read(RunFolder(finished).store)
    count = 10_000 if long else 600
    noticed = same = shorter = 0
    for bad in all_different(whole, count, seed=9):
        closed.write_bytes(bad)
        with pytest.raises(HarnessError):
            store.read(closed)
        killed.write_bytes(bad)
        try:
            found = store.read(killed)
        except HarnessError:
            noticed += 1
        else:
            same += found == before
            shorter += found != before
            for part in ("runs", "attempts", "measured"):
                rows = getattr(found, part)
                assert rows == getattr(before, part)[: len(rows)]
        for beside in killed.parent.glob("run.sqlite-*"):
            beside.unlink()
    assert noticed > count / 4
    figure(9, f"closed store: {count:,} mutations, {count:,} refused, 0 silent")
    figure(9, f"never closed: {noticed:,} refused, {same:,} meant nothing, {shorter:,} cut the end, 0 other")


@pytest.mark.fault(9)
def test_09_a_damaged_log_is_found_by_the_files_of_the_cells(killed: Path, tmp_path: Path, long: bool, figure) -> None:
    """A torn log is silent in SQLite: the reader gets a shorter table. The same command finds what it lacks."""
    log = (killed / "run.sqlite-wal").read_bytes()
    whole = shutil.copytree(killed, tmp_path / "whole")
    expected = recorded_again(whole)
    assert len(expected) >= 4
    count, shorter, rebuilt = 2000 if long else 40, 0, 0
    mutations = [b"", *all_different(log, count - 1, seed=29)]
    for number, bad in enumerate(mutations):
        out = tmp_path / str(number)
        shutil.copytree(killed, out)
        (out / "run.sqlite-wal").write_bytes(bad)
        (out / "run.sqlite-shm").unlink(missing_ok=True)
        with contextlib.suppress(HarnessError):
            shorter += len(results(out)) < len(expected)
        assert recorded_again(out) == expected
        rebuilt += (out / "run.sqlite.bad").exists()
        shutil.rmtree(out)
    assert shorter > 0
    figure(9, f"log: {count:,} mutations, {shorter:,} shortened the table unnoticed by SQLite, all rows found again")


DAMAGE: dict[str, Callable[[sqlite3.Connection], object]] = {
    "an edited number": lambda c: c.execute("UPDATE measured SET value = 2.5 WHERE seq = 2"),
    "a deleted row": lambda c: c.execute("DELETE FROM measured WHERE seq = 1"),
    "the last row deleted": lambda c: c.execute("DELETE FROM measured WHERE seq = (SELECT max(seq) FROM measured)"),
    "an edited status": lambda c: c.execute("UPDATE attempts SET status = 'error', reason = 'x' WHERE seq = 1"),
    "a trigger": lambda c: c.execute("CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM measured; END"),
    "a view": lambda c: c.execute("CREATE VIEW v AS SELECT * FROM measured"),
    "a dropped table": lambda c: c.execute("DROP TABLE runs"),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize("what", [*DAMAGE, "garbage", "half the file"])
def test_09_a_damaged_store_is_kept_and_rebuilt(finished: Path, tmp_path: Path, what: str, capsys) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    path, before = RunFolder(out).store, results(out)
    if what in DAMAGE:
        connection = sqlite3.connect(path)
        DAMAGE[what](connection)
        connection.commit()
        connection.close()
    else:
        whole = path.read_bytes()
        path.write_bytes(b"\0garbage" * 500 if what == "garbage" else whole[: len(whole) // 2])
    bad = path.read_bytes()
    with pytest.raises(store.Damaged):
        results(out)
    assert recorded_again(out) == before
    assert path.with_name("run.sqlite.bad").read_bytes() == bad
    assert "kept as run.sqlite.bad" in capsys.readouterr().err


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("version", "words"), [(store.SCHEMA_VERSION + 1, "install the harness that wrote it"), (0, "another --out")]
)
def test_33_a_store_of_another_schema_is_refused_and_left_as_it_is(
    quick: Quick, finished: Path, tmp_path: Path, version: int, words: str, figure
) -> None:
    """It is not damaged: it is neither rebuilt nor put aside, by whatever command."""
    out = shutil.copytree(finished, tmp_path / "run")
    path = RunFolder(out).store
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    path.with_name("run.sqlite.sha256").unlink()  # whoever wrote it closed it: its checksum would fit
    other = path.read_bytes()
    command = [sys.executable, "-P", "-m", "harness", "results", str(out)]
    for done, code in ((quick.run(out), 2), (subprocess.run(command, capture_output=True, text=True, check=False), 2)):
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(HarnessError, match=words):
        Store(path)
    assert path.read_bytes() == other
    assert sorted(path.parent.glob("run.sqlite*")) == [path]
    figure(33, f"schema {version} where {store.SCHEMA_VERSION} is known: refused with what to do, 0 bytes changed")


@pytest.mark.fault(33)
def test_33_stores_that_were_written_when_the_schema_was_new_are_read(figure) -> None:
    golden = sorted((Path(__file__).parents[1] / "reports" / "stores").glob("*/run.sqlite"))
    assert len(golden) >= 3
    for path in golden:
        assert store.read(path).measured
    figure(33, f"{len(golden)} of {len(golden)} golden stores read; one schema so far, so that none is migrated")


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


@pytest.mark.fault(9)
def test_09_no_damage_to_packed_layers_and_artifacts_changes_what_is_read(tmp_path: Path, long: bool, figure) -> None:
    import torch
    from layers import random_layer

    from harness.kernels.pack import pack, unpack
    from harness.kernels.packfile import load_packed, save_packed
    from harness.quantized import QuantizedModel
    from harness.quantizer import ActivationSpec
    from harness.transform import InputTransform, Permutation

    def same(a: object, b: object) -> bool:
        parts = ("codes", "scales", "zeros", "bits", "group_size", "axis", "activation")
        return all(
            torch.equal(x, y) if isinstance(x := getattr(a, part), torch.Tensor) else x == getattr(b, part)
            for part in parts
            for y in [getattr(b, part)]
        ) and torch.equal(a.weight(), b.weight())  # type: ignore[attr-defined]

    transform = InputTransform(torch.rand(128) + 1, (Permutation(torch.randperm(128)),))
    linears = {
        "a": random_layer(64, 128, group=64, bias=True, activation=ActivationSpec(8), transform=transform),
        "b": random_layer(64, 128, bits=2, group=64),
    }
    packed, artifact = tmp_path / "packed.safetensors", tmp_path / "quantized.safetensors"
    save_packed({name: pack(linear) for name, linear in linears.items()}, packed)
    QuantizedModel(linears).save(artifact)
    count = 5000 if long else 300
    for path, load in (
        (packed, lambda: {name: unpack(layer) for name, layer in load_packed(packed).items()}),
        (artifact, lambda: QuantizedModel.load(artifact).linears),
    ):
        whole, refused = path.read_bytes(), 0
        before = load()
        for bad in all_different(whole, count, seed=39):
            path.write_bytes(bad)
            try:
                after = load()
            except HarnessError:
                refused += 1
            else:
                assert after.keys() == before.keys()
                assert all(same(after[name], before[name]) for name in before)
        assert refused > 0.9 * count
        figure(9, f"{path.stem}: {count:,} mutations, {refused:,} refused, 0 silent")
