import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import atomic


def test_old_or_new_but_never_half(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    atomic.write_json(target, {"n": 0})
    code = (
        "import sys; from pathlib import Path; from harness import atomic\n"
        "n = 0\nwhile True: n += 1; atomic.write_json(Path(sys.argv[1]), {'n': n, 'fill': 'x' * 100_000})"
    )
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-P", "-c", code, str(target)])
        while writer.poll() is None and json.loads(target.read_text())["n"] < 2:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert json.loads(target.read_text())["n"] >= 2
        atomic.write_json(target, {"n": 0})
    atomic.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    atomic.write_json(target, 1)
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(target, float("nan"))
    with contextlib.suppress(RuntimeError), atomic.replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "1\n" and len(list(tmp_path.iterdir())) == 1
