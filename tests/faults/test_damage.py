"""Files that are not as they were written: noticed, or without a meaning; never read as something else."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.boundaries import Nobody
from faults.damage import all_different
from faults.quick import Quick, left_behind, results, statuses, wait_for

from harness import store
from harness.errors import HarnessError
from harness.executors.local import LocalExecutor
from harness.limits import Limits
from harness.planfile import read_plan
from harness.runfolder import RunFolder
from harness.store import Run, Store

WHEN = "2026-01-01T00:00:00+00:00"


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
