"""The documents say what is so: the tutorial runs, the contract is what the docstrings say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from made_runs import README

from harness.contract import document
from harness.reports import formats
from harness.reports.gathered import gather
from harness.reports.plots import draw
from harness.reports.report import Report

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "demo.svg"


def test_the_contract_is_current() -> None:
    assert (ROOT / "docs" / "method-contract.md").read_text() == document(), "python -m harness.contract > docs/…"


def test_the_table_of_the_readme_is_what_the_demo_s_store_renders_to() -> None:
    shown = (ROOT / "README.md").read_text().partition("tox -e readme -->\n\n")[2].partition("\n<!-- end of")[0]
    assert shown == formats.markdown(Report.of([README]).boards), "tox -e readme -- tests/reports/stores/readme"


def test_the_plot_of_the_readme_has_the_demo_s_words(tmp_path: Path) -> None:
    name, _ = next(iter(draw(gather([README]), tmp_path)))
    kept, drawn = ([*ElementTree.parse(path).getroot().itertext()] for path in (FIGURE, tmp_path / name))
    assert kept == drawn  # methods, settings and the numbers of the axes; coordinates may differ between machines
    assert "gptq" in " ".join(kept)


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
