"""The results store: what it refuses, what it notices, what survives."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from harness import store as store_module
from harness.errors import BadOutput, HarnessError, Infrastructure
from harness.store import SCHEMA_VERSION, Attempt, Damaged, Measured, Run, Store, read

CELL = "0123456789abcdef"


def attempt(number: int = 1, **changes: object) -> Attempt:
    row = Attempt(CELL, number, 1, "ok", None, 0, 1.5, 2.0, 3.0, 1000, 4.25, 500, "2026-01-01T00:00:00+00:00")
    return row._replace(**changes)


def measured(task: str = "pydoc", **changes: object) -> Measured:
    row = Measured(CELL, task, "token_perplexity", 20.5, 0.25, 16, 0, 1.0, "2026-01-01T00:00:00+00:00")
    return row._replace(**changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


@pytest.fixture
def filled(path: Path) -> Path:
    store = Store(path)
    store.begin(Run("2026-01-01T00:00:00+00:00", "{}", "{}"))
    store.add_measured([measured(), measured(metric="accuracy", value=1, stderr=None, higher_is_better=1)])
    store.add_attempt(attempt())
    store.close()
    return path


def test_rows_come_back_as_they_were_written(filled: Path) -> None:
    contents = read(filled)
    assert contents.attempts == [attempt()]
    assert contents.measured[1] == measured(metric="accuracy", value=1.0, stderr=None, higher_is_better=1)
    assert len(contents.runs) == 1


def test_closed_store_is_one_file_that_can_be_read_where_nobody_may_write(filled: Path) -> None:
    assert {file.name for file in filled.parent.iterdir()} == {"run.sqlite", "run.sqlite.sha256"}
    connection = sqlite3.connect(filled)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
    filled.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert read(filled).attempts == [attempt()]
    finally:
        filled.parent.chmod(stat.S_IRWXU)


def test_readers_see_commits_of_a_store_that_is_open(path: Path) -> None:
    store = Store(path)
    store.add_measured([measured()])
    assert read(path).measured == [measured()]
    store.add_measured([measured("c4")])
    assert len(read(path).measured) == 2
    store.close()


def test_opened_again_it_goes_on(filled: Path) -> None:
    store = Store(filled)
    store.add_attempt(attempt(2, status="error", reason="why"))
    store.close()
    assert [row.attempt for row in read(filled).attempts] == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        {"value": float("nan")}, {"value": float("inf")}, {"value": -float("inf")}, {"stderr": float("nan")},
        {"stderr": -1.0}, {"n": -1}, {"higher_is_better": 2}, {"seconds": -1.0}, {"seconds": float("nan")},
        {"metric": ""}, {"cell": "short"}, {"value": None}, {"n": "many"},
    ],
)  # fmt: skip
def test_a_bad_measurement_is_refused_and_takes_its_task_with_it(path: Path, bad: dict[str, object]) -> None:
    store = Store(path)
    with pytest.raises((BadOutput, TypeError)):
        store.add_measured([measured(metric="good"), measured(**bad)])
    store.add_measured([measured("c4")])  # the chain of digests is whole
    store.close()
    assert [row.task for row in read(path).measured] == ["c4"]


@pytest.mark.parametrize(
    "bad",
    [
        {"status": "fine"}, {"status": "error"}, {"reason": "though ok"}, {"attempt": 0}, {"load_seconds": -1.0},
        {"evaluate_seconds": float("inf")}, {"peak_memory_bytes": -1}, {"bits_per_weight": 0.0}, {"run": 0},
        {"load_seconds": "x"}, {"load_seconds": []}, {"packed_bytes": 2**70}, {"packed_bytes": 0.5},
    ],
)  # fmt: skip
def test_a_bad_attempt_is_refused(path: Path, bad: dict[str, object]) -> None:
    store = Store(path)
    with pytest.raises(BadOutput):
        store.add_attempt(attempt(**bad))
    store.close()
    assert read(path).attempts == []


def test_a_negative_zero_is_zero(path: Path) -> None:
    """SQLite keeps no sign of zero: sealed as it was given, the row would count as damaged for ever."""
    store = Store(path)
    store.add_measured([measured(metric="kl", value=-0.0, stderr=-0.0)])
    store.close()
    assert repr(read(path).measured[0].value) == "0.0"


@pytest.mark.parametrize("changes", [{"n": 4.0}, {"n": "4"}, {"task": "a\0b", "higher_is_better": True}])
def test_what_would_come_back_as_something_else_is_refused(path: Path, changes: dict[str, object]) -> None:
    store = Store(path)
    with pytest.raises(BadOutput):
        store.add_measured([measured(**changes)])
    store.close()
    assert read(path).measured == []


def test_nothing_is_recorded_twice(filled: Path) -> None:
    store = Store(filled)
    with pytest.raises(BadOutput):
        store.add_measured([measured(value=1.0)])
    with pytest.raises(BadOutput):
        store.add_attempt(attempt())
    store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE measured SET value = 20.4 WHERE seq = 1",
        "UPDATE measured SET stderr = NULL WHERE seq = 1",
        "DELETE FROM measured WHERE seq = 1",
        "UPDATE attempts SET status = 'error', reason = 'x'",
        "UPDATE measured SET digest = 'x' WHERE seq = 2",
        "CREATE TABLE more (x)",
        "CREATE TRIGGER t AFTER INSERT ON measured BEGIN DELETE FROM measured; END",
        "DROP TABLE runs",
    ],
)
def test_tampering_is_noticed_and_the_message_says_how_to_rebuild(filled: Path, statement: str) -> None:
    connection = sqlite3.connect(filled)
    connection.execute(statement)
    connection.commit()
    connection.close()
    for opened in (read, Store):
        with pytest.raises(HarnessError, match="damaged") as caught:
            opened(filled)
        assert "run.sqlite.bad" in str(caught.value)


def test_no_flipped_byte_changes_what_is_read(filled: Path) -> None:
    whole, before = filled.read_bytes(), read(filled)
    copy = filled.with_name("flipped.sqlite")
    noticed = 0
    for at in range(0, len(whole), 41):
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            assert read(copy) == before  # the byte meant nothing
        except HarnessError:
            noticed += 1
    assert noticed > 10


def test_a_closed_store_is_read_by_its_checksum_and_any_other_row_by_row(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    verified = store_module._verified
    monkeypatch.setattr(store_module, "_verified", lambda *words: looked.append(words[0]) or verified(*words))
    before = read(filled)
    assert looked == []
    writer = Store(filled)
    looked.clear()
    assert read(filled) == before  # open for writing: the checksum is of an earlier state
    assert looked == ["runs", "attempts", "measured"]
    writer.add_attempt(attempt(2))
    writer.close()
    looked.clear()
    assert len(read(filled).attempts) == 2
    assert looked == []
    store_module.checksum_path(filled).unlink()
    assert len(read(filled).attempts) == 2
    assert looked == ["runs", "attempts", "measured"]


@pytest.mark.parametrize("opened", [read, Store])
def test_rows_cut_off_the_end_of_a_closed_store_are_missed(filled: Path, opened) -> None:
    """The chain of digests of what is left is whole: only the checksum of the file tells."""
    connection = sqlite3.connect(filled)
    connection.execute("DELETE FROM measured WHERE seq = 2")
    connection.commit()
    connection.close()
    with pytest.raises(Damaged, match="changed after it was closed"):
        opened(filled)


@pytest.mark.parametrize(
    ("metric", "bad", "good"), [("acc", 1.5, 1.0), ("acc_norm", -0.1, 0.0), ("token_perplexity", 0.5, 1.0)]
)
def test_numbers_that_a_metric_cannot_have_are_refused(path: Path, metric: str, bad: float, good: float) -> None:
    store = Store(path)
    with pytest.raises(BadOutput, match="not between"):
        store.add_measured([measured(metric=metric, value=bad)])
    store.add_measured([measured(metric=metric, value=good)])
    store.close()


def test_a_store_that_was_damaged_while_open_gets_no_checksum(filled: Path) -> None:
    store = Store(filled)
    other = sqlite3.connect(filled)
    other.execute("UPDATE measured SET value = 20.4 WHERE seq = 1")
    other.commit()
    other.close()
    with pytest.raises(HarnessError, match="row 1 of measured"):
        store.close()
    with pytest.raises(HarnessError, match="row 1 of measured"):
        read(filled)


def test_foreign_newer_and_missing_databases_are_refused(filled: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(HarnessError, match="not a results store"):
        read(foreign)
    connection = sqlite3.connect(filled)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    for opened in (read, Store):
        with pytest.raises(HarnessError, match=f"schema version {SCHEMA_VERSION + 1}") as caught:
            opened(filled)
        assert "install" in str(caught.value)
    with pytest.raises(HarnessError, match="no results here"):
        read(tmp_path / "nothing.sqlite")
    garbage = tmp_path / "garbage.sqlite"
    garbage.write_bytes(b"\x00garbage" * 500)
    with pytest.raises(HarnessError, match="damaged"):
        read(garbage)


def test_a_deleted_or_replaced_file_stops_the_writer(filled: Path) -> None:
    store = Store(filled)
    copy = filled.with_name("copy")
    shutil.copy(filled, copy)
    copy.replace(filled)
    with pytest.raises(Infrastructure, match="deleted or moved"):
        store.add_measured([measured("c4")])
    filled.unlink()
    with pytest.raises(Infrastructure, match="deleted or moved"):
        store.add_attempt(attempt(2))
    store._connection.close()


def fill(store: Store) -> None:
    for number in range(1000):
        store.add_measured([measured(f"task{number}")])


def test_a_full_disk_is_told_and_loses_nothing(filled: Path) -> None:
    store = Store(filled)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (filled.stat().st_size, limits[1]))
    try:
        with pytest.raises(Infrastructure, match="make room"):
            fill(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.add_measured([measured("after")])  # there is room again
    store.close()
    rows = read(filled).measured
    assert rows[-1].task == "after"
    assert len(rows) == len({row.task + row.metric for row in rows}) >= 3


WRITER = """
import sys
from pathlib import Path
from harness.store import Measured, Store
store = Store(Path(sys.argv[1]))
for number in range(10**6):
    store.add_measured([Measured("0123456789abcdef", f"t{number}", "m", 1.0, None, 1, 1, 0.0, "now")])
    print(number, flush=True)
"""


def test_kill_of_the_writer_loses_no_acknowledged_row(path: Path) -> None:
    for lines in (1, 7, 30):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        acknowledged += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        rows = read(path).measured
        assert len(rows) >= len([line for line in acknowledged if line.endswith("\n")])
        for leftover in path.parent.glob("run.sqlite-*"):
            leftover.unlink()
