"""Where and how the command line is used: locales, narrow terminals, closed pipes, silent hubs, wrong words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.quick import Quick

HARNESS = [sys.executable, "-P", "-m", "harness"]
LOCALES: dict[str, dict[str, str]] = {
    "C": {"LC_ALL": "C"}, "de_DE": {"LC_ALL": "de_DE.ISO-8859-1", "LANGUAGE": "de"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"PYTHONIOENCODING": "ascii"}, "40 columns": {"COLUMNS": "40"}, "no terminal": {"TERM": "dumb"},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = quick.planned(tmp_path_factory.mktemp("finished") / "run")
    assert quick.run(out).returncode == 0
    return out


@pytest.mark.fault(37)
def test_37_the_same_bytes_in_every_locale(finished: Path, tmp_path: Path, figure) -> None:
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO", "COLUMNS"))
    }
    differing = 0
    for kind in ("markdown", "csv"):
        outputs = set()
        for number, changes in enumerate([{"LC_ALL": "C.UTF-8"}, *LOCALES.values()]):
            target = tmp_path / f"{kind}-{number}"
            words = [*HARNESS, "results", str(finished), "--format", kind]
            done = subprocess.run(words, env=plain | changes, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            assert b"Traceback" not in done.stderr
            outputs.add(done.stdout)
            del target
        differing += len(outputs) - 1
    assert differing == 0
    assert "↓".encode() in next(iter(outputs)) or kind == "csv"
    figure(37, f"{len(LOCALES)} locales and terminals: 0 differing outputs")


@pytest.mark.fault(37)
def test_37_whoever_reads_may_leave(finished: Path, figure) -> None:
    words = " ".join([*HARNESS, "results", str(finished)])
    for command in (
        f"{words} | true",
        f"{words} | head -c 1",
        f"{words} >&-",
        f"{words} 2>&- | cat",
        f"{words} >/dev/full",
    ):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr, command
        assert "BrokenPipe" not in done.stderr, command
        assert "Exception ignored" not in done.stderr, command
    figure(37, "closed and full outputs: 0 tracebacks")


@pytest.mark.fault(37)
def test_37_a_file_in_utf8_is_read_as_such_everywhere(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_bytes('# ü\nmethods = ["rtn"]\nmodels = ["./ü"]\n'.encode())
    done = subprocess.run(
        [*HARNESS, "run", str(sweep)], env={**os.environ, **LOCALES["ASCII"]}, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert "no such folder" in done.stderr.decode()
    assert "ü" in done.stderr.decode()


@pytest.mark.fault(29)
def test_29_all_mistakes_at_once_and_soon(tmp_path: Path, figure) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text('method = ["rtn"]\njobs = "two"\nsettngs = ["W4A16"]\nseed = 1.5\n[quick]\ntask = []\n')
    words = [
        *HARNESS, "run", "--methods", "rtn,rtn,rtm", "--models", "no-such-model", "--settings", "W5A3,W4A16", "--tasks",
        "piqqa", "--calibration", "c5:1x1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    found = 0
    for command, parts in (
        ([*HARNESS, "run", str(sweep)], ("method", "jobs", "settngs", "seed", "task", ":2", ":3")),
        (words, ("named twice", "rtm", "no-such-model", "W5A3", "piqqa", "c5")),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        for part in parts:
            assert part in done.stderr, part
        found += len(parts)
    code = f"import sys; sys.argv = {words[3:]!r}\nfrom harness.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "import time; print(time.process_time(), 'torch' in sys.modules)"
    seconds, torch = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()[-2:]
    assert torch == "False"
    assert float(seconds) < 2
    assert not (tmp_path / "run").exists()
    figure(29, f"{found} of {found} named, {float(seconds):.2f} s of processor time, torch not imported")


@pytest.mark.fault(30)
def test_30_missing_data_is_named_before_anything_runs(quick: Quick, tmp_path: Path, figure) -> None:
    tasks = ("wikitext2", "c4", "piqa")
    done = quick.run(tmp_path / "run", "--data-root", str(tmp_path), tasks=tasks)
    assert done.returncode == 2
    for part in ("Salesforce/wikitext", "allenai/c4", "piqa"):
        assert part in done.stderr, done.stderr
    offline = quick.run(
        tmp_path / "run", tasks=("wikitext2",), environment={"HF_HUB_OFFLINE": "1", "HARNESS_DATA_ROOT": ""}
    )
    assert offline.returncode == 2
    assert "hub is switched off" in offline.stderr
    assert not (tmp_path / "run").exists()
    figure(30, f"{len(tasks)} of {len(tasks)} missing data sets named beforehand")


@pytest.mark.fault(30)
def test_30_a_hub_that_does_not_answer(tmp_path: Path, long: bool, figure) -> None:
    """It takes the connection and says nothing."""
    if not long:
        pytest.skip("with --long: it waits 20 seconds")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path),
            "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        start = time.monotonic()
        words = [*HARNESS, "models", "fetch", "somebody/something"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 1
    assert "could not be fetched from the hub" in done.stderr
    assert "Traceback" not in done.stderr
    figure(30, f"a silent hub: told after {time.monotonic() - start:.0f} s")
