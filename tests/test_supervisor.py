"""Real cells in real processes on a tiny model: endings, resume, interruption, kills at any moment."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from harness import processes, store

BROKEN = Path(__file__).parent / "broken_methods"
TASKS = "pydoc:length=32:windows=2"
TIMES = ("seconds", "created")
Rows = list[dict[str, Any]]


def words(
    model: Path, out: Path, *more: str, methods: str = "rtn", settings: str = "W4A16g64", tasks: str = TASKS
) -> list[str]:
    return [
        sys.executable, "-P", "-m", "harness", "run", "--methods", methods, "--models", str(model), "--settings",
        settings, "--tasks", tasks, "--calibration", "pydoc:2x32", "--threads", "1", "--out", str(out), *more,
    ]  # fmt: skip


def run(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(*args, **kwargs), capture_output=True, text=True, timeout=200, check=False)


def results(out: Path, *more: str) -> Rows:
    command = [sys.executable, "-P", "-m", "harness", "results", str(out), "--format", "json", *more]
    rows: Rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return rows


def timeless(rows: Rows) -> str:
    return json.dumps([{key: value for key, value in row.items() if key not in TIMES} for row in rows])


def snapshot(out: Path, pattern: str = "**/*") -> dict[str, tuple[int, int]]:
    """What tells whether a file was written anew: its inode and time."""
    return {
        str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.glob(pattern)
        if path.is_file()
    }


class Undisturbed(NamedTuple):
    out: Path
    wall_seconds: float
    said: str
    about_itself: dict[str, Any]


WATCHED = """
import json, sys
from harness import processes
from harness.cli import main
try:
    main()
finally:
    heavy = [n for n in ("torch", "transformers", "numpy", "pandas", "lm_eval", "datasets") if n in sys.modules]
    print(json.dumps({"peak_bytes": processes.peak_resident_bytes(), "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run of the baseline and one method, whose supervisor tells about itself at the end."""
    out = tmp_path_factory.mktemp("finished") / "run"
    command = words(tiny_folder, out)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCHED, *command[4:]], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    about_itself = json.loads(done.stdout.splitlines()[-1])
    return Undisturbed(out, time.monotonic() - start, done.stderr, about_itself)


@pytest.fixture(scope="module")
def finished(undisturbed: Undisturbed) -> Path:
    return undisturbed.out


def test_the_supervisor_is_light(undisturbed: Undisturbed) -> None:
    assert undisturbed.about_itself["heavy"] == []
    assert undisturbed.about_itself["peak_bytes"] < 150_000_000


def test_next_to_no_time_is_spent_outside_the_children(undisturbed: Undisturbed) -> None:
    children = sum(float(seconds) for seconds in re.findall(r"\(([\d.]+) s\)", undisturbed.said))
    own_start = 2.0  # of the supervisor's interpreter, generously
    assert undisturbed.wall_seconds < 1.05 * children + own_start


def test_a_run_measures_the_baseline_and_the_method(finished: Path) -> None:
    rows = results(finished)
    assert [(row["method"], row["setting"], row["metric"], row["status"]) for row in rows] == [
        ("fp", "W16A16", "token_perplexity", "ok"), ("rtn", "W4A16g64", "token_perplexity", "ok"),
    ]  # fmt: skip
    assert all(row["value"] > 1 and row["n"] > 0 and row["task"] == TASKS for row in rows)
    cells = results(finished, "--cells")
    assert [cell["status"] for cell in cells] == ["ok", "ok"]
    assert cells[0]["bits_per_weight"] == 32
    assert 4 < cells[1]["bits_per_weight"] < 5
    assert (finished / cells[1]["artifact"]).is_file()
    assert all(cell["peak_memory_bytes"] > 10**8 and cell["evaluate_seconds"] > 0 for cell in cells)
    contents = store.read(finished / "run.sqlite")
    assert len(contents.runs) == 1
    assert json.loads(contents.runs[0].provenance)["packages"]["torch"]


def test_a_finished_run_is_left_untouched_and_answers_quickly(finished: Path, tiny_folder: Path) -> None:
    before = snapshot(finished)
    start = time.monotonic()
    done = run(tiny_folder, finished)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 3
    assert "start" not in done.stderr
    after = snapshot(finished)
    before.pop("run.lock"), after.pop("run.lock")
    assert after == before
    assert (finished / "run.lock").read_text() == ""


def test_a_run_accepts_more_and_refuses_other_terms(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    artifacts = snapshot(out, "cells/*/quantized.safetensors")
    more = "pydoc_kl:length=32:windows=1"
    done = run(tiny_folder, out, "--jobs", "2", tasks=f"{TASKS},{more}")
    assert done.returncode == 0, done.stderr
    rows = results(out)
    assert timeless([row for row in rows if row["task"] == TASKS]) == timeless(results(finished))
    assert {row["task"] for row in rows} == {TASKS, more}
    assert snapshot(out, "cells/*/quantized.safetensors") == artifacts
    for flags in (["--seed", "1"], ["--dtype", "bfloat16"], ["--calibration", "pydoc:3x32"]):
        refused = run(tiny_folder, out, *flags)
        assert refused.returncode == 2
        assert "use another --out" in refused.stderr


@pytest.mark.fault_with_real_cells(12, 13, 16, 19)
def test_every_broken_method_ends_by_its_name_and_costs_its_own_cell_only(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    expected = {
        "raises_at_import": "error", "raises_when_made": "error", "raises": "error", "segfaults": "crashed",
        "leaves": "crashed",
        "eats_memory": "oom_host", "writes_garbage": "bad_output", "supports_nothing": "unsupported",
        "returns_nan": "bad_output",
    }  # fmt: skip
    out = copied(finished, tmp_path)
    methods = ",".join([*(f"{BROKEN / name}.py" for name in expected), "rtn:clip_search=true"])
    done = run(tiny_folder, out, "--jobs", "2", "--memory", "1.5GB", methods=methods)
    assert done.returncode == 1, done.stderr
    cells = {cell["method"]: cell for cell in results(out, "--cells")}
    assert {name: cells[name]["status"] for name in expected} == expected
    assert (cells["fp"]["status"], cells["rtn"]["status"]) == ("ok", "ok")
    for name, reason in (
        ("raises", "ValueError: broken on purpose"), ("raises_when_made", "TypeError: broken on purpose when made"),
        ("raises_at_import", "RuntimeError: broken on purpose at import"),
        ("segfaults", "killed by SIGSEGV"), ("leaves", "exit code 0 and no result"), ("returns_nan", "scale"),
        ("supports_nothing", "W4A16g64 is not for me"),
    ):  # fmt: skip
        assert reason in cells[name]["reason"]
    assert cells["eats_memory"]["peak_memory_bytes"] > 10**9
    assert 'raise ValueError("broken on purpose")' in log(out, cells["raises"]["cell"])
    assert not left_behind(out)
    rows = [row for row in results(out) if row["method"] == "leaves"]
    assert [(row["status"], row["value"], row["metric"]) for row in rows] == [("crashed", None, None)]


@pytest.mark.fault_with_real_cells(3)
def test_interrupt_records_the_cell_and_the_same_command_goes_on(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = copied(finished, tmp_path)
    hanging = words(tiny_folder, out, methods=f"{BROKEN}/hangs.py")
    first = started(hanging, "hangs")
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=10)
    assert first.returncode == 130
    assert not left_behind(out)
    status = lambda: {cell["method"]: cell["status"] for cell in results(out, "--cells")}  # noqa: E731
    assert status() == {"fp": "ok", "rtn": "ok", "hangs": "interrupted"}
    again = subprocess.run([*hanging, "--timeout", "1"], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert ["hangs" in line for line in again.stderr.splitlines() if line.startswith("start")] == [True]
    assert status() == {"fp": "ok", "rtn": "ok", "hangs": "timeout"}
    third = subprocess.run(hanging, capture_output=True, text=True, check=False)
    assert third.returncode == 1
    assert "start" not in third.stderr  # a timeout is not run again unasked


@pytest.mark.fault_with_real_cells(25)
def test_two_jobs_give_the_integers_of_one(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished / "inputs", out / "inputs")
    shutil.copy(finished / "plan.json", out)
    assert run(tiny_folder, out, "--jobs", "2").returncode == 0
    assert timeless(results(out)) == timeless(results(finished))
    for artifact in finished.glob("cells/*/quantized.safetensors"):
        mine, theirs = load_file(artifact), load_file(out / artifact.relative_to(finished))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_lost_store_is_rebuilt_from_the_cells(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path)
    (out / "run.sqlite").unlink()
    done = run(tiny_folder, out)
    assert done.returncode == 0, done.stderr
    assert "start" not in done.stderr
    assert timeless(results(out)) == timeless(results(finished))


KILLS = int(os.environ.get("HARNESS_TEST_KILLS", "4"))  # tests/faults has many more, of quicker cells


@pytest.mark.fault_with_real_cells(1)
def test_kills_at_any_moment_lose_nothing(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """SIGKILL supervisor or worker at random moments; the same command finishes, and the results are byte-equal."""
    out, dice = tmp_path / "run", random.Random(0)
    longest = 1.3 * max(cell["evaluate_seconds"] for cell in results(finished, "--cells")) + 2.5
    kept: dict[str, tuple[int, int]] = {}
    for _ in range(KILLS):
        supervisor = subprocess.Popen(words(tiny_folder, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.2, longest))
        victims = [process.pid for process in left_behind(out)]
        processes.send(dice.choice(victims) if victims and dice.random() < 0.5 else supervisor.pid, signal.SIGKILL)
        if dice.random() < 0.5:
            supervisor.kill()
        supervisor.wait()
        kept |= {name: mark for name, mark in final_files(out).items() if name not in kept}
    assert run(tiny_folder, out).returncode == 0
    assert timeless(results(out)) == timeless(results(finished))
    after = final_files(out)
    assert {name: after[name] for name in kept} == kept  # nothing that was final was computed again
    assert not left_behind(out)
    assert not list(out.rglob(".tmp-*"))


def copied(finished: Path, folder: Path) -> Path:
    """A run folder of a test's own, with the baseline and the method already there."""
    shutil.copytree(finished, folder / "run")
    return folder / "run"


def started(command: list[str], title: str) -> subprocess.Popen[str]:
    """A run that has just started the cell whose title holds ``title``."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    assert any(line.startswith("start") and title in line for line in process.stderr)
    return process


def final_files(out: Path) -> dict[str, tuple[int, int]]:
    return snapshot(out, "cells/*/tasks/*.json") | snapshot(out, "cells/*/quantized.json")


def left_behind(out: Path) -> list[processes.Process]:
    return processes.marked(f"HARNESS_RUN_FOLDER={out.resolve()}")


def log(out: Path, cell: str) -> str:
    return (out / "cells" / cell / "log.txt").read_text()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
