"""The documents say what is so: the tutorial runs, the contract is what the docstrings say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from harness.contract import document

ROOT = Path(__file__).parents[1]


def test_the_contract_is_current() -> None:
    assert (ROOT / "docs" / "method-contract.md").read_text() == document(), "python -m harness.contract > docs/…"


def test_the_tutorial_runs(tiny_folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "MODEL": str(tiny_folder)}
    said = []
    for language, text in blocks:
        words = ["bash", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    assert "0 failed" in said[2]
    assert "my_method:shrink=0.2" in said[3]
