"""The command line: quick, plain, and never with a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "pandas", "lm_eval", "datasets", "scipy")
QUICK_SECONDS = 0.8  # of processor time, which another process does not lengthen; the aim is 0.3


def harness(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    command = [sys.executable, "-P", "-m", "harness", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def time_of_children() -> float:
    """Processor seconds that processes started here, and ended, have taken."""
    took = os.times()
    return took.children_user + took.children_system


@pytest.fixture(scope="module", autouse=True)
def _index_of_lm_eval() -> None:
    """The first look-up of a task name on a machine reads lm-eval's files, once."""
    harness("run", "--tasks", "none_such")


@pytest.mark.parametrize(
    "words",
    [
        ["list", "methods"],
        ["list", "tasks"],
        ["list", "models"],
        ["list", "settings"],
        ["--help"],
        ["run", "--methods", "rtm", "--models", "smollm", "--settings", "W5A3", "--tasks", "piqqa"],
        ["results", "/nowhere"],
        ["nonsense"],
        ["methods", "check", "fp"],
        ["methods", "check", "rtn", "./nowhere.py"],
    ],
)
def test_every_answer_is_quick_and_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    start = time_of_children()
    done = harness(*words)
    assert time_of_children() - start < QUICK_SECONDS
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    code = (
        "import sys\nfrom harness.cli import main\n"
        f"sys.argv = ['harness', *{words!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    inside = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert inside.stdout.endswith("HEAVY []\n")


COMMANDS = (
    "run", "results", "report", "leaderboard", "compare", "list", "models fetch", "methods check", "methods new",
    "data mirror", "export", "bench", "doctor",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = harness(*command.split(), "--help")
    assert done.returncode == 0
    assert f"Example: harness {command}" in " ".join(done.stdout.split())


def test_all_mistakes_of_a_run_are_told_at_once(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    done = harness(
        "run", "--methods", "rtm,rtn:clip_serch=true,none.py", "--models", f"smollm2-135n,{pickled}", "--settings",
        "W5A3,W4A16,W4A16", "--tasks", "piqqa,pydoc:windos=2", "--calibration", "c5:4x4", "--data-root", "/nowhere",
        "--dtype", "float8", "--jobs", "0", "--memory", "much", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 2
    for part in (
        "did you mean 'rtn'", "clip_serch", "none.py", "smollm2-135m", "pickled", "W5A3", "'W4A16' is named twice",
        "piqa", "windos", "c5", "/nowhere", "float8", "--jobs 0", "much",
    ):  # fmt: skip
        assert part in done.stderr, part
    assert "Traceback" not in done.stderr
    assert done.stderr.count("fix:") >= 13
    assert not (tmp_path / "run").exists()


def test_an_empty_command_says_what_to_add() -> None:
    done = harness("run")
    assert done.returncode == 2
    assert "--methods rtn" in done.stderr
    assert "--models smollm2-135m" in done.stderr


def test_groups_that_do_not_divide_name_those_that_do(tiny_folder: Path, tmp_path: Path) -> None:
    done = harness("run", "--methods", "rtn", "--models", str(tiny_folder), "--settings", "W4A16g100,W4A16g64")
    assert done.returncode == 2
    assert "groups of 100 do not divide" in done.stderr
    assert "choose g from 8, 16, 32, 64" in done.stderr
    assert "g64'" not in done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f'methods = ["rtn"]\nmodels = ["{tiny_folder}"]\nsettings = ["W4A16", "W4A8"]\nout = "{out}"\n')
    done = harness("run", str(sweep), "--settings", "W2A16", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "W2A16" in done.stdout
    assert "W4A8" not in done.stdout
    assert "W16A16" in done.stdout
    assert not out.exists()


def test_unknown_commands_and_flags_get_a_suggestion() -> None:
    assert "'results'" in harness("result", "x").stderr
    assert "--methods" in harness("run", "--method", "rtn").stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    words = f"{sys.executable} -P -m harness list tasks | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_doctor_reports_what_is_here(tmp_path: Path) -> None:
    done = harness("doctor", "--data-root", str(tmp_path))
    assert done.returncode in (0, 1)  # 1 where this machine lacks disk or a package
    for part in ("python", "torch", "triton", "data root", "disk for runs"):
        assert part in done.stdout
    assert "Traceback" not in done.stderr


def test_results_of_something_else_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    done = harness("results", str(tmp_path))
    assert done.returncode == 2
    assert "the plan cannot be read" in done.stderr
    (tmp_path / "plan.json").write_text(json.dumps({"format": 99}))
    assert "format 99" in harness("results", str(tmp_path)).stderr
