"""The process is killed at its Nth write, or the disk fails from there, for every N."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.quick import Quick, cell, results, statuses

from harness.runfolder import RunFolder

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the shim with")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim.c"), "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def unrecorded(quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose cells have ended and whose store is gone."""
    out = quick.planned(tmp_path_factory.mktemp("unrecorded") / "run")
    assert quick.run(out).returncode == 0
    RunFolder(out).store.unlink()
    return out


@pytest.mark.fault(5, 7)
@pytest.mark.parametrize(("row", "how"), [(5, "kill"), (5, "tear"), (7, "full"), (7, "broken")])
@pytest.mark.parametrize("scenario", ["store", "supervisor", "worker"])
def test_05_07_every_write(
    scenario: str, row: int, how: str, shim: Path, unrecorded: Path, tmp_path: Path, long: bool, figure
) -> None:  # fmt: skip
    if how in ("tear", "broken") and not long:
        pytest.skip("with --long: half of the Nth write, an I/O error from it on")
    words = [sys.executable, "-P", str(HERE / "boundaries.py"), scenario, how, str(tmp_path)]
    words += [str(unrecorded)] if scenario == "supervisor" else []
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        words,
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == [], done.stderr
    assert found["writes"] >= 5  # a shim that counts nothing would be quick to pass
    assert found["rows"] >= 2
    figure(row, f"{scenario}, {how}: {found['writes']} writes, 0 failures")


@pytest.mark.fault(7)
def test_07_a_full_disk_stops_the_run_and_room_lets_it_finish(
    quick: Quick, unrecorded: Path, tmp_path: Path, figure
) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    out = quick.planned(tmp_path / "run")
    words = quick.words(out)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=250, preexec_fn=small_disk)
    assert done.returncode == 1
    assert "run the same command" in done.stderr
    assert str(out) in done.stderr
    assert "Traceback" not in done.stderr
    assert quick.run(out).returncode == 0
    assert quick.run(unrecorded).returncode == 0
    assert [row["value"] for row in results(out)] == [row["value"] for row in results(unrecorded)]
    RunFolder(unrecorded).store.unlink()
    figure(7, "the run stops, says where, and goes on when there is room")


@pytest.mark.fault(8)
def test_08_a_moved_folder_stops_the_run(quick: Quick, tmp_path: Path, figure) -> None:
    out = quick.planned(tmp_path / "run")
    run = quick.start(out, behave={"step_seconds": 0.3})
    assert run.stderr is not None
    assert any(line.startswith("[1/3]") for line in run.stderr)
    out.rename(tmp_path / "moved")
    _, said = run.communicate(timeout=250)
    assert run.returncode == 1
    assert "deleted or moved" in said
    assert "Traceback" not in said
    (tmp_path / "moved").rename(out)
    assert quick.run(out).returncode == 0
    assert set(statuses(out).values()) == {"ok"}
    figure(8, "a moved folder stops the run at its next event; put back, it goes on")


def _without_override() -> None:
    """Root obeys the modes of files from the next exec on."""
    import ctypes

    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.fault(8)
def test_08_a_read_only_folder(quick: Quick, tmp_path: Path, figure) -> None:
    """A new run is refused before anything is computed; a finished one is still read."""
    finished, fresh = quick.planned(tmp_path / "finished"), quick.planned(tmp_path / "fresh")
    assert quick.run(finished).returncode == 0
    expected = results(finished)
    (finished / "run.lock").unlink()
    for folder in [finished, *finished.rglob("*"), fresh]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    try:
        how = {"capture_output": True, "text": True, "check": False, "timeout": 250, "preexec_fn": _without_override}
        refused = subprocess.run(quick.words(fresh), **how)
        assert (refused.returncode, "choose another --out" in refused.stderr) == (2, True), refused.stderr
        assert "start" not in refused.stderr
        words = [sys.executable, "-P", "-m", "harness", "results", str(finished), "--format", "json"]
        read = subprocess.run(words, **how)
        assert read.returncode == 0, read.stderr
        assert [row["value"] for row in json.loads(read.stdout)] == [row["value"] for row in expected]
    finally:
        for folder in [finished, *finished.rglob("*"), fresh]:
            folder.chmod(0o755 if folder.is_dir() else 0o644)
    figure(8, "read-only: refused before a cell starts; a finished run is read")


@pytest.mark.fault(31)
def test_31_the_clock_steps_back(quick: Quick, shim: Path, tmp_path: Path, figure) -> None:
    """By an hour, at various moments, in two time zones: rows keep their order, seconds stay positive."""
    tables = []
    for number, (calls, zone) in enumerate([(3, "Europe/Berlin"), (40, "Asia/Kolkata"), (400, "UTC")]):
        out = quick.planned(tmp_path / str(number))
        code = (
            "import ctypes, runpy, sys;"
            "ctypes.CDLL(None).shim_clock(ctypes.c_long(int(sys.argv[1])), ctypes.c_long(-3600));"
            "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        words = quick.words(out)
        environment = {**os.environ, "LD_PRELOAD": str(shim), "TZ": zone}
        done = subprocess.run(
            [*words[:2], "-c", code, str(calls), *words[2:]],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        from harness import store

        found = store.read(RunFolder(out).store)
        seconds = [
            value
            for row in found.attempts
            for value in (row.quantize_seconds, row.evaluate_seconds)
            if value is not None
        ]
        assert all(value >= 0 for value in seconds)
        assert all(row.created.endswith("+00:00") for row in [*found.attempts, *found.measured])
        assert [row.cell for row in found.attempts] == [cell(out, s).id for s in ("W16A16", "W4A16", "W8A16")]
        tables.append([(row["setting"], row["task"], row["value"]) for row in results(out)])
    assert tables[0] == tables[1] == tables[2]
    figure(31, "3 runs, clock back by an hour, 3 time zones: 0 negative durations, order kept, results equal")
