"""Reading /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from harness import processes


def test_own_session_holds_this_process() -> None:
    me = next(process for process in processes.session(os.getsid(0)) if process.pid == os.getpid())
    assert me.resident_bytes > 1_000_000
    assert processes.peak_resident_bytes() >= me.resident_bytes * 0.5


def test_marked_processes_are_found_wherever_they_went() -> None:
    child = subprocess.Popen(
        ["sleep", "60"], env={"PATH": os.environ["PATH"], "SOME_MARK": "x1"}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 5
        while not processes.marked("SOME_MARK=x1") and time.monotonic() < deadline:
            time.sleep(0.01)  # until it is the sleep, with its own environment
        assert [process.pid for process in processes.marked("SOME_MARK=x1")] == [child.pid]
        assert processes.marked("SOME_MARK=x") == []
        assert processes.end_all(lambda: processes.marked("SOME_MARK=x1")) == [child.pid]
        assert processes.marked("SOME_MARK=x1") == []  # a zombie is not alive
    finally:
        child.kill()
        child.wait()


CHILD = (
    "import os, time; from harness import processes; print(processes.die_with({parent}), flush=True); time.sleep(60)"
)


def test_a_child_dies_with_its_parent() -> None:
    inner = CHILD.format(parent="os.getppid()")
    start = f"c = subprocess.Popen([sys.executable, '-P', '-c', {inner!r}])"
    outer = f"import subprocess, sys, time\n{start}\nprint(c.pid, flush=True)\ntime.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-P", "-c", outer], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "True\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while (found := processes._read(child)) is not None and found.state not in "ZX" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found is None or found.state in "ZX"


def test_a_child_whose_parent_is_gone_is_told_so() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD.format(parent="1").replace("time.sleep(60)", "0")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
