"""Killed, interrupted, started again: nothing that was finished is lost, and the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.quick import Quick, content, left_behind, results, statuses, wait_for

from harness import processes, store
from harness.errors import HarnessError
from harness.runfolder import RunFolder


@pytest.fixture(scope="module")
def undisturbed(quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = quick.planned(tmp_path_factory.mktemp("undisturbed") / "run")
    done = quick.run(out)
    assert done.returncode == 0, done.stderr
    return out


def unreadable(out: Path) -> bool:
    path = RunFolder(out).store
    try:
        store.read(path, "rw") if path.exists() else None
    except HarnessError:
        return True
    return False


def finished(out: Path) -> dict[str, tuple[bytes, int, int]]:
    """The files that make a task or an artifact final."""
    return {
        name: kept for name, kept in content(out).items()
        if name.startswith("cells/") and re.search(r"/(quantized|tasks/.*)\.json$", name)
    }  # fmt: skip


@pytest.mark.fault(1)
def test_01_kills_at_any_moment(quick: Quick, undisturbed: Path, tmp_path: Path, long: bool, figure) -> None:
    """SIGKILL the supervisor, a worker, or both; then the same command finishes as if nothing had happened.

    A kill counts when what it hits is alive; runs that end before it are started anew in another folder.
    """
    kills = 200 if long else 16
    dice, lost, broken, struck, rounds = random.Random(0), 0, 0, 0, 0
    while struck < kills:
        out = quick.planned(tmp_path / str(rounds))
        kept: dict[str, tuple[bytes, int, int]] = {}
        rows: list[store.Measured] = []
        run = None
        while struck < kills and (run is None or run.returncode != 0):
            run = quick.start(out, behave={"step_seconds": 0.05})
            wait_for(lambda out=out, run=run: (out / "run.lock").exists() or run.poll() is not None)
            time.sleep(dice.uniform(0, 0.8))
            victims = [process.pid for process in left_behind(out)]
            if victims and dice.random() < 0.5:
                processes.send(dice.choice(victims), signal.SIGKILL)
                struck += 1
            if dice.random() < 0.7:
                struck += run.poll() is None
                run.kill()
            run.communicate()
            broken += unreadable(out)
            now = finished(out)
            lost += sum(now.get(name) != mark for name, mark in kept.items())
            kept = now
            found = store.read(RunFolder(out).store, "rw").measured if RunFolder(out).store.exists() else []
            lost += found[: len(rows)] != rows
            rows = found
        assert quick.run(out).returncode == 0
        assert results(out) == results(undisturbed)
        after = finished(out)
        lost += sum(after[name] != mark for name, mark in kept.items())
        assert not left_behind(out)
        assert not list(out.rglob(".tmp-*"))
        rounds += 1
    assert (lost, broken) == (0, 0)
    figure(
        1,
        f"{struck} kills: {lost} finished files or rows lost, {broken} unreadable stores, "
        f"results equal {rounds}/{rounds}",
    )


@pytest.mark.fault(2)
def test_02_a_killed_worker_costs_its_own_cell_only(quick: Quick, tmp_path: Path, figure) -> None:
    out = quick.planned(tmp_path / "run")
    run = quick.start(out, "--jobs", "3", behave={"W4A16": "hang"})
    wait_for(lambda: statuses(out).get("W8A16") == "ok" and len(left_behind(out)) > 0)
    start = time.monotonic()
    for process in left_behind(out):
        processes.send(process.pid, signal.SIGKILL)
    run.communicate()
    seconds = time.monotonic() - start
    assert statuses(out) == {"W16A16": "ok", "W4A16": "crashed", "W8A16": "ok"}
    assert run.returncode == 1
    again = quick.run(out)  # nobody says that the method did it: it is run once more
    assert again.returncode == 0
    assert again.stderr.count("start") == 1
    assert set(statuses(out).values()) == {"ok"}
    figure(2, f"0 cells lost beside it; run over {seconds:.2f} s after the kill")


@pytest.mark.fault(3, 4)
@pytest.mark.parametrize(
    ("row", "signals", "how", "code"),
    [
        (3, [signal.SIGINT], "hang", 130),
        (3, [signal.SIGINT, signal.SIGINT], "cling", 130),
        (4, [signal.SIGTERM], "hang", 143),
    ],
)
def test_03_04_signals(quick: Quick, tmp_path: Path, row: int, signals: list[int], how: str, code: int, figure) -> None:
    out = quick.planned(tmp_path / "run")
    run = quick.start(out, "--jobs", "3", behave={"W4A16": how})
    wait_for(lambda: statuses(out).get("W8A16") == "ok" and statuses(out).get("W16A16") == "ok")
    orphans = [process.pid for process in left_behind(out)]
    start = time.monotonic()
    for number in signals:
        run.send_signal(number)
        time.sleep(0.2)
    _, said = run.communicate()
    seconds = time.monotonic() - start
    assert run.returncode == code
    assert "Traceback" not in said
    assert "the same command goes on from here" in said
    assert statuses(out) == {"W16A16": "ok", "W4A16": "interrupted", "W8A16": "ok"}
    assert not left_behind(out)
    assert orphans
    before = finished(out)
    again = quick.run(out)
    assert again.returncode == 0
    assert again.stderr.count("start") == 1
    assert {name: mark for name, mark in finished(out).items() if name in before} == before
    name = signal.Signals(signals[0]).name + " twice" * (len(signals) > 1)
    figure(row, f"{name}: exit {code} after {seconds:.1f} s, 0 orphans, 0 cells lost")


@pytest.mark.fault(6)
def test_06_a_finished_run_is_left_as_it_is(quick: Quick, undisturbed: Path, figure) -> None:
    before = content(undisturbed)
    for _ in range(2):
        done = quick.run(undisturbed)
        assert done.returncode == 0
        assert "start" not in done.stderr
    after = content(undisturbed)
    before.pop("run.lock"), after.pop("run.lock")
    assert after == before
    figure(6, "0 cells run, 0 bytes changed")


@pytest.mark.fault(11)
def test_11_two_runs_at_once(quick: Quick, tmp_path: Path, long: bool, figure) -> None:
    """They start together on one folder: every cell is run once, by whoever came first."""
    races, twice, refused = 100 if long else 4, 0, 0
    for number in range(races):
        out = quick.planned(tmp_path / str(number), settings=("W8A16",))
        pair = [quick.start(out, settings=("W8A16",)) for _ in range(2)]
        ends = [(run.communicate()[1], run.returncode) for run in pair]
        for said, code in ends:
            assert code == 0 or (code == 2 and "another run is using this folder" in said), said
            refused += code == 2
        started = "".join(said for said, _ in ends).count("start")
        twice += started != 2  # the baseline and the one cell
        assert set(statuses(out).values()) == {"ok"}
    assert twice == 0
    figure(11, f"{races} races: 0 cells run twice, {refused} refused")


READER = """
import sys, json
from pathlib import Path
from harness.errors import HarnessError
from harness.results import load, measurement_rows
out, reads, seen = Path(sys.argv[1]), 0, 0
while seen < int(sys.argv[2]):
    rows = list(measurement_rows(load(out)))
    assert len(rows) >= seen
    assert all(row["value"] is not None for row in rows)
    seen, reads = len(rows), reads + 1
print(reads)
"""


@pytest.mark.fault(11)
def test_11_readers_during_a_run(quick: Quick, tmp_path: Path, figure) -> None:
    settings = ("W4A16", "W8A16", "W3A16", "W2A16")
    out = quick.planned(tmp_path / "run", settings=settings)
    words = [sys.executable, "-P", "-c", READER, str(out), str(2 * (len(settings) + 1))]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    done = quick.run(out, settings=settings, behave={"step_seconds": 0.02})
    ends = [reader.communicate() for reader in readers]
    assert done.returncode == 0, done.stderr
    assert [reader.returncode for reader in readers] == [0, 0], ends
    reads = sum(int(said) for said, _ in ends)
    figure(11, f"{reads} reads during a run, 0 errors")


@pytest.mark.fault(11)
def test_11_the_second_names_the_first_and_a_dead_one_frees_the_folder(quick: Quick, tmp_path: Path) -> None:
    out = quick.planned(tmp_path / "run")
    first = quick.start(out, behave={"W4A16": "hang"})
    try:
        wait_for(lambda: statuses(out).get("W16A16") == "ok")
        second = quick.run(out)
        assert second.returncode == 2
        assert f"pid {first.pid} on" in second.stderr
    finally:
        first.kill()
        first.communicate()
    wait_for(lambda: not left_behind(out))  # what it was computing dies with it
    assert quick.run(out).returncode == 0


ENDS = {
    "W4A16": ("raise", "error"), "W8A16": ("memory error", "oom_host"), "W3A16": ("nan", "bad_output"),
    "W2A16": ("leave", "crashed"), "W4A8": ("exit 3", "crashed"), "W8A8": ("segfault", "crashed"),
    "W3A8": ("abort", "crashed"), "W2A8": ("kill", "crashed"), "W4A4": ("hang", "timeout"),
    "W2A4": ("cling", "timeout"),
}  # fmt: skip
REASONS = {
    "W4A16": "ValueError: broken on purpose", "W2A16": "exit code 0 and no result", "W4A8": "exit code 3",
    "W8A8": "SIGSEGV", "W3A8": "SIGABRT", "W2A8": "SIGKILL", "W4A4": "stopped after", "W2A4": "stopped after",
}  # fmt: skip


@pytest.mark.fault(13, 14)
def test_13_14_every_death_has_its_name_and_costs_its_own_cell_only(quick: Quick, tmp_path: Path, figure) -> None:
    settings = (*ENDS, "W8A4")
    out = quick.planned(tmp_path / "run", settings=settings)
    behave = {setting: how for setting, (how, _) in ENDS.items()}
    done = quick.run(out, "--jobs", "4", "--timeout", "15", settings=settings, behave=behave)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = {setting: status for setting, (_, status) in ENDS.items()}
    assert statuses(out) == {"W16A16": "ok", **expected, "W8A4": "ok"}
    from harness import results as rows

    last = {found.cell.setting: found.last for found in rows.load(out)}
    for setting, words in REASONS.items():
        assert words in (last[setting].reason or ""), (setting, last[setting])
    assert not left_behind(out)
    seconds = max(
        float(line.rpartition("(")[2].partition(" s)")[0]) for line in done.stderr.splitlines() if " timeout " in line
    )
    figure(13, f"{len(ENDS)} of {len(ENDS)} ends named right, the other 2 cells ok")
    figure(14, f"limit 15 s, gone after {seconds:.1f} s with 5 s of grace; 0 orphans")


@pytest.mark.fault(16)
def test_16_memory_runs_out(quick: Quick, tmp_path: Path, figure) -> None:
    out = quick.planned(tmp_path / "run", settings=("W4A16", "W8A16", "W2A16"))
    done = quick.run(
        out, "--memory", "900MB", settings=("W4A16", "W8A16", "W2A16"),
        behave={"W4A16": "eat", "W8A16": "memory error"},
    )  # fmt: skip
    assert done.returncode == 1
    assert statuses(out) == {"W16A16": "ok", "W4A16": "oom_host", "W8A16": "oom_host", "W2A16": "ok"}
    from harness import results as rows

    (eaten,) = [found.last for found in rows.load(out) if found.cell.setting == "W4A16"]
    assert eaten is not None and eaten.peak_memory_bytes is not None
    assert 900e6 < eaten.peak_memory_bytes < 2000e6
    figure(16, f"2 of 2 named; stopped at {eaten.peak_memory_bytes / 1e6:.0f} MB of 900")


@pytest.mark.fault(23)
def test_23_nothing_of_one_cell_reaches_the_next(quick: Quick, tmp_path: Path, figure) -> None:
    """And no secret of the user's reaches any."""
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "SSH_AUTH_SOCK", "PIP_INDEX_URL")
    secrets = dict.fromkeys(names, "s3cret")
    out = quick.planned(tmp_path / "run")
    done = quick.run(out, behave={"W4A16": "change", "W8A16": "tell"}, environment=secrets)
    assert done.returncode == 0
    from faults.quick import cell

    said = RunFolder(out).cell(cell(out, "W8A16").id).log.read_text()
    told, _, umask = said.partition("environment: ")[2].rpartition("umask: ")
    environment = json.loads(told)
    assert "BEHIND" not in environment
    assert int(umask.split()[0]) == os.umask(os.umask(0o22)) or int(umask.split()[0]) == 0o22
    assert "s3cret" not in told
    assert environment["HF_HUB_OFFLINE"] == "1"
    figure(23, "0 changes reach the next cell; 0 of 5 secrets reach a worker")
