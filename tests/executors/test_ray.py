"""A run on a Ray cluster of this machine: the results of a local run, whatever is killed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import processes, store

pytest.importorskip("ray", reason="Ray is not installed: pip install ptq-harness[ray]")

TASK = "pydoc:length=32:windows=2"
PATIENCE_SECONDS = 280  # on a machine with much else to do
SLEEPY = Path(__file__).parent / "sleepy.py"
TIMES = ("seconds", "created", "quantize_seconds", "evaluate_seconds", "peak_memory_bytes", "artifact")
CLUSTER = """
import sys, ray
joined = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
                  _node_ip_address="127.0.0.1", _temp_dir=sys.argv[1])
print(joined.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
MACHINES = """
import sys
from ray.cluster_utils import Cluster
room = dict(object_store_memory=80_000_000)
cluster = Cluster(initialize_head=True, head_node_args=dict(room, num_cpus=0, temp_dir=sys.argv[1]))
machine = cluster.add_node(num_cpus=1, **room)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(machine, allow_graceful=False)
cluster.add_node(num_cpus=1, **room)
print("replaced", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module", autouse=True)
def settings_of_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it listens on the loopback interface only
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 leaves cells nothing of a busy machine
        yield


@pytest.fixture(scope="module")
def cluster(cache_of_the_tests: Path) -> Iterator[str]:
    """The address of a cluster of one machine with two processors; it ends with the tests, however they end.

    ``HARNESS_TEST_RAY`` names one on this machine that is there already: Ray gives up on a start that takes long.
    """
    if address := os.environ.get("HARNESS_TEST_RAY"):
        yield address
        return
    with script(CLUSTER) as (_, address):
        yield address


@contextmanager
def script(text: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A script that starts a cluster: the process, and the address that it says. It ends with its input."""
    start = [sys.executable, "-P", "-c", text]
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,  # sockets: short
        subprocess.Popen([*start, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "Ray did not start"
        yield process, address
        process.stdin.close()


def words(model: Path, out: Path, *more: str, methods: str = "rtn,gptq") -> list[str]:
    return [
        sys.executable, "-P", "-m", "harness", "run", "--methods", methods, "--models", str(model), "--settings",
        "W4A16g64", "--tasks", TASK, "--calibration", "pydoc:2x32", "--threads", "1", "--out", str(out), *more,
    ]  # fmt: skip


def on_ray(cluster: str, *more: str) -> tuple[str, ...]:
    return "--executor", "ray", "--address", cluster, *more


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


def results(out: Path, *more: str) -> str:
    """What a run has measured, without the times."""
    command = [sys.executable, "-P", "-m", "harness", "results", str(out), "--format", "json", *more]
    rows = json.loads(run(command).stdout)
    return json.dumps([{key: value for key, value in row.items() if key not in TIMES} for row in rows], indent=1)


def statuses(out: Path) -> dict[str, list[str]]:
    """How the attempts at each cell ended, by method."""
    if not (out / "run.sqlite").is_file():
        return {}
    methods = {cell["id"]: cell["method"] for cell in json.loads((out / "plan.json").read_text())["cells"]}
    found: dict[str, list[str]] = {}
    for row in store.read(out / "run.sqlite").attempts:
        found.setdefault(methods[row.cell], []).append(row.status)
    return found


@pytest.fixture(scope="module")
def local(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "run"
    done = run(words(tiny_folder, out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def sleepy(tmp_path: Path) -> Path:
    """A method of this test's own; ``sleepy.note`` beside it says that it sleeps."""
    return Path(shutil.copy(SLEEPY, tmp_path))


@pytest.fixture
def prepared(local: Path, tmp_path: Path) -> Path:
    """A run folder in which the models are prepared and nothing is computed."""
    out = tmp_path / "run"
    shutil.copytree(local / "inputs", out / "inputs")
    shutil.copy(local / "plan.json", out)
    return out


def test_integers_and_results_are_those_of_a_local_run(
    cluster: str, local: Path, prepared: Path, tiny_folder: Path
) -> None:
    done = run(words(tiny_folder, prepared, *on_ray(cluster)))
    assert done.returncode == 0, done.stderr
    assert results(prepared) == results(local)
    assert results(prepared, "--cells") == results(local, "--cells")
    same_integers(local, prepared)


def test_files_travel_through_a_url_where_no_disk_is_shared(
    cluster: str, local: Path, prepared: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/depot"
    done = run(words(tiny_folder, prepared, *on_ray(cluster, "--artifacts", url)))
    assert done.returncode == 0, done.stderr
    assert results(prepared) == results(local)
    assert not list(prepared.glob("cells/*/quantized.safetensors"))  # it is where it was uploaded to, and stays there
    same_integers(local, prepared, tmp_path / "depot")


@pytest.mark.fault(2)
def test_a_killed_worker_costs_its_own_cell_only(cluster: str, prepared: Path, tiny_folder: Path, sleepy: Path) -> None:
    """The cell's own process: the run finishes, and the same command tries the cell once more."""
    command = words(tiny_folder, prepared, *on_ray(cluster), methods=f"{sleepy},rtn")
    driver = subprocess.Popen(command)
    os.kill(sleeper(sleepy), signal.SIGKILL)
    assert driver.wait(timeout=PATIENCE_SECONDS) == 1
    assert statuses(prepared) == {"fp": ["ok"], "rtn": ["ok"], "sleepy": ["crashed"]}
    assert "SIGKILL" in str(store.read(prepared / "run.sqlite").attempts)
    assert run(command).returncode == 0
    assert statuses(prepared) == {"fp": ["ok"], "rtn": ["ok"], "sleepy": ["crashed", "ok"]}


@pytest.mark.fault(2)
def test_a_killed_ray_worker_costs_one_more_attempt(
    cluster: str, prepared: Path, tiny_folder: Path, sleepy: Path
) -> None:
    driver = subprocess.Popen(words(tiny_folder, prepared, *on_ray(cluster), methods=str(sleepy)))
    child = sleeper(sleepy)
    os.kill(parent_of(child), signal.SIGKILL)
    assert driver.wait(timeout=PATIENCE_SECONDS) == 0
    assert statuses(prepared) == {"fp": ["ok"], "sleepy": ["infra", "ok"]}
    assert not alive(child)
    reason = store.read(prepared / "run.sqlite").attempts
    assert any("lost by Ray" in (row.reason or "") for row in reason)


@pytest.mark.fault(2)
def test_a_lost_machine_costs_one_more_attempt(
    prepared: Path, tiny_folder: Path, sleepy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: its raylet, its workers, its store. The cell waits for another machine and is run there."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # several machines do not listen on the loopback interface
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with script(MACHINES) as (machines, address):
        driver = subprocess.Popen(words(tiny_folder, prepared, *on_ray(address), methods=str(sleepy)))
        child = sleeper(sleepy)
        print(file=machines.stdin, flush=True)
        assert machines.stdout is not None and machines.stdout.readline() == "replaced\n"
        assert driver.wait(timeout=PATIENCE_SECONDS) == 0
    assert statuses(prepared) == {"fp": ["ok"], "sleepy": ["infra", "ok"]}
    assert not alive(child)
    assert any("lost by Ray" in (row.reason or "") for row in store.read(prepared / "run.sqlite").attempts)


@pytest.mark.fault(1)
def test_a_killed_driver_leaves_nothing_behind_and_is_gone_on_from(
    cluster: str, prepared: Path, tiny_folder: Path, sleepy: Path
) -> None:
    command = words(tiny_folder, prepared, *on_ray(cluster), methods=str(sleepy))
    driver = subprocess.Popen(command)
    child = sleeper(sleepy)
    wait_for(lambda: statuses(prepared).get("fp") == ["ok"])
    driver.kill()
    driver.wait()
    wait_for(lambda: not alive(child))
    assert run(command).returncode == 0
    assert statuses(prepared) == {"fp": ["ok"], "sleepy": ["ok"]}


def test_an_interrupt_is_recorded_and_the_same_command_goes_on(
    cluster: str, prepared: Path, tiny_folder: Path, sleepy: Path
) -> None:
    command = words(tiny_folder, prepared, *on_ray(cluster), methods=str(sleepy))
    driver = subprocess.Popen(command)
    child = sleeper(sleepy)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    wait_for(lambda: not alive(child))
    assert statuses(prepared)["sleepy"] == ["interrupted"]
    assert run(command).returncode == 0
    assert statuses(prepared)["sleepy"] == ["interrupted", "ok"]


def test_what_fits_nowhere_is_refused_with_the_number(cluster: str, prepared: Path, tiny_folder: Path) -> None:
    done = run(words(tiny_folder, prepared, *on_ray(cluster, "--memory", "5TB"), methods="rtn"))
    assert done.returncode == 2
    assert "needs 1 CPU, 5.0 TB, and no machine has that" in done.stderr
    assert not (prepared / "cells").exists()


def same_integers(local: Path, other: Path, depot: Path | None = None) -> None:
    artifacts = list(local.glob("cells/*/quantized.safetensors"))
    assert len(artifacts) == 2
    for artifact in artifacts:
        relative = artifact.relative_to(local if depot is None else local / "cells")
        mine, theirs = load_file(artifact), load_file((depot or other) / relative)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def sleeper(method: Path) -> int:
    """The process in which the method sleeps, once it does."""
    note = method.with_suffix(".note")
    wait_for(lambda: note.exists() and note.read_text() != "")
    return int(note.read_text())


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    process: Any = processes._read(pid)
    return process is not None and process.state not in "ZX"


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
