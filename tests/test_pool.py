"""Child processes: how they end is told, limits hold, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from harness import processes
from harness.endings import Ending
from harness.limits import Limits
from harness.pool import Command, Pool

SAY = """
import os, json, sys
def say(**e): os.write(int(os.environ['HARNESS_EVENTS_FD']), (json.dumps(e) + '\\n').encode())
"""


@pytest.fixture
def command(tmp_path: Path):
    def make(code: str, name: str = "child") -> Command:
        words = (sys.executable, "-S", "-c", SAY + textwrap.dedent(code))
        return Command(name, words, {"PATH": os.environ["PATH"]}, tmp_path / f"{name}.log")

    return make


def outcome(*commands: Command, heard: list[dict[str, Any]] | None = None, **limits: Any) -> dict[str, Ending]:
    happenings = list(Pool(Limits(**{"grace_seconds": 0.3, **limits})).run(commands))
    if heard is not None:
        heard += [event for _, event in happenings if not isinstance(event, Ending)]
    return {command.name: ending for command, ending in happenings if isinstance(ending, Ending)}


@pytest.mark.parametrize(
    ("code", "returncode"),
    [
        ("sys.exit(3)", 3),
        ("os._exit(0)", 0),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("raise ValueError('why')", 1),
    ],
)
def test_ends_are_told_apart(command, code: str, returncode: int) -> None:
    ending = outcome(command(code))["child"]
    assert (ending.returncode, ending.stopped) == (returncode, None)


def test_output_goes_to_the_log_and_events_to_the_listener(command, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    outcome(
        command("print('out'); sys.stdout.flush(); os.write(2, b'err'); say(event='a', n=1); say(event='b')"),
        heard=heard,
    )
    assert (tmp_path / "child.log").read_text() == "out\nerr"
    assert heard == [{"event": "a", "n": 1}, {"event": "b"}]


def test_garbage_and_floods_on_the_event_pipe_are_survived(command) -> None:
    heard: list[dict[str, Any]] = []
    code = """
    fd = int(os.environ['HARNESS_EVENTS_FD'])
    os.write(fd, b'\\xff\\xfe not json\\n[1, 2]\\n')
    for i in range(300): os.write(fd, b'x' * 65536)
    os.write(fd, b'\\n')
    say(event='last')
    """
    ending = outcome(command(code), heard=heard)["child"]
    assert (ending.returncode, heard) == (0, [{"event": "last"}])


def test_a_child_past_its_deadline_is_stopped(command) -> None:
    start = time.monotonic()
    ending = outcome(command("import time; time.sleep(60)"), timeout_seconds=0.5)["child"]
    assert ending.stopped == "timeout"
    assert ending.returncode == -signal.SIGTERM
    assert time.monotonic() - start < 5


def test_a_clinging_family_is_stopped_whole(command, tmp_path: Path) -> None:
    """TERM is ignored; a grandchild left the session; another holds the event pipe open."""
    code = """
    import signal, subprocess, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    children = [subprocess.Popen(['sleep', '9'], **how) for how in ({'start_new_session': True}, {'close_fds': False})]
    say(event='pids', pids=[os.getpid(), *(c.pid for c in children)])
    while True: time.sleep(60)
    """
    heard: list[dict[str, Any]] = []
    ending = outcome(command(code), heard=heard, timeout_seconds=1.0)["child"]
    assert (ending.stopped, ending.returncode) == ("timeout", -signal.SIGKILL)
    assert not [pid for pid in heard[0]["pids"] if alive(pid)]


def test_what_a_child_leaves_behind_ends_with_it(command) -> None:
    code = """
    import subprocess
    left = subprocess.Popen(['sleep', '60'], start_new_session=True)
    say(event='pid', pid=left.pid)
    os._exit(0)
    """
    heard: list[dict[str, Any]] = []
    start = time.monotonic()
    assert outcome(command(code), heard=heard)["child"].returncode == 0
    assert time.monotonic() - start < 5
    assert not alive(heard[0]["pid"])


def test_a_child_that_eats_memory_is_stopped_and_its_peak_told(command) -> None:
    code = """
    import time
    hoard = []
    while True:
        hoard.append(b'x' * 10_000_000)
        time.sleep(0.01)
    """
    ending = outcome(command(code), memory_bytes=200_000_000)["child"]
    assert (ending.stopped, ending.returncode) == ("memory", -signal.SIGKILL)
    assert 200_000_000 < (ending.peak_bytes or 0) < 1_000_000_000


def test_jobs_run_side_by_side_and_in_order(command) -> None:
    heard: list[dict[str, Any]] = []
    code = (
        "import time; say(event='start', at=time.monotonic()); time.sleep(0.4); say(event='end', at=time.monotonic())"
    )
    start = time.monotonic()
    endings = outcome(*(command(code, f"c{i}") for i in range(4)), heard=heard, jobs=2)
    assert sorted(endings) == ["c0", "c1", "c2", "c3"]
    assert 0.8 < time.monotonic() - start < 1.6
    at = sorted((event["at"], event["event"]) for event in heard)
    running = [sum(1 if kind == "start" else -1 for _, kind in at[: i + 1]) for i in range(len(at))]
    assert max(running) == 2


def test_the_next_child_starts_before_the_end_of_the_last_is_looked_at(command, tmp_path: Path) -> None:
    pool = Pool(Limits())
    mark = tmp_path / "started"
    run = pool.run([command("", "a"), command(f"open({str(mark)!r}, 'w')", "b")])
    assert next(run)[0].name == "a"
    deadline = time.monotonic() + 5
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mark.exists()
    assert [command.name for command, _ in run] == ["b"]


def test_whoever_stops_listening_stops_the_children(command) -> None:
    pool = Pool(Limits(jobs=2))
    long = command("import time; say(event='pid', pid=os.getpid()); time.sleep(60)", "long")
    run = pool.run([long, command("import time; time.sleep(0.5)", "short")])
    heard = next(run)[1]
    assert next(run)[0].name == "short"
    run.close()
    assert isinstance(heard, dict)
    assert not alive(heard["pid"])


INTERRUPTED = """
import json, sys
from pathlib import Path
from harness.limits import Limits
from harness.pool import Command, Pool
code = "import signal, time, sys; signal.signal(15, 1 if sys.argv[1] == 'deaf' else 0); time.sleep(60)"  # 1 is ignore
words = (sys.executable, "-S", "-c", code, sys.argv[1])
pool = Pool(Limits(grace_seconds=30))
commands = [Command(f"c{i}", words, {}, Path(sys.argv[2]) / f"{i}.log") for i in range(2)]
print("ready", flush=True)
ends = {command.name: ending.stopped for command, ending in pool.run(commands)}
print(json.dumps([ends, pool.interrupted_by]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_the_children_and_starts_no_more(tmp_path: Path, number: int) -> None:
    parent, seconds = interrupted(tmp_path, "polite", [number])
    assert json.loads(parent) == [{"c0": "interrupt"}, number]
    assert seconds < 3


def test_two_signals_do_not_wait_for_anybody(tmp_path: Path) -> None:
    parent, seconds = interrupted(tmp_path, "deaf", [signal.SIGINT, signal.SIGINT])
    assert json.loads(parent) == [{"c0": "interrupt"}, signal.SIGINT]
    assert seconds < 2


def test_a_signal_that_asks_for_nothing_stops_nobody(command) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        for _, happening in Pool(Limits()).run([command("import time; say(event='here'); time.sleep(0.5)")]):
            if not isinstance(happening, Ending):
                os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert isinstance(happening, Ending)
    assert (happening.stopped, happening.returncode) == (None, 0)


def interrupted(folder: Path, manners: str, signals: list[int]) -> tuple[str, float]:
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", INTERRUPTED, manners, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    start = time.monotonic()
    for number in signals:
        parent.send_signal(number)
        time.sleep(0.2)
    return parent.communicate()[0], time.monotonic() - start


def alive(pid: int) -> bool:
    process = processes._read(pid)
    return process is not None and process.state not in "ZX"
