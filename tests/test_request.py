"""TOML files and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import HarnessError, Problems
from harness.plan import draft
from harness.request import Request, read_toml, request_from


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return path

    return write


def test_file_and_flags_make_one_request_and_flags_win(toml) -> None:
    table = read_toml(toml('methods = ["rtn", "gptq:damp=0.1"]\nseed = 3\ntimeout = 5\nmemory = "2GB"\n'))
    request = request_from(table.values, {"seed": 4, "models": ("tiny",), "jobs": None})
    assert request == Request(methods=("rtn", "gptq:damp=0.1"), models=("tiny",), seed=4, timeout=5, memory="2GB")


def test_a_quick_run_is_the_files_own_with_other_keys(toml) -> None:
    path = toml('methods = ["rtn"]\nseed = 3\n[quick]\nmethods = ["rtn:axis=ic"]\n')
    assert read_toml(path).values == {"methods": ("rtn",), "seed": 3}
    assert read_toml(path, quick=True).values == {"methods": ("rtn:axis=ic",), "seed": 3}


def test_a_quick_run_needs_its_table_and_mistakes_there_are_told(toml) -> None:
    with pytest.raises(HarnessError, match=r"write a table \[quick\]"):
        read_toml(toml('methods = ["rtn"]\n'), quick=True)
    (problem,) = read_toml(toml('methods = ["rtn"]\n[quick]\nsed = 1\n')).problems
    assert str(problem.where).endswith("sweep.toml:3")


def test_all_mistakes_are_told_at_once_with_their_lines(toml) -> None:
    """Those of its keys with those of its words."""
    text = 'metods = ["rtn"]\nseed = "1"\nsettings = ["W5A3"]\nmodels = "tiny"\njobs = true\n[extra]\nx = 1\n'
    path = toml(text)
    keys = read_toml(path)
    assert keys.values == {"settings": ("W5A3",)}
    with pytest.raises(Problems) as caught:
        draft(request_from(keys.values, {"models": ("no-such-model",)}), keys.problems)
    message = str(caught.value)
    assert "8 problems" in message  # no method is named either
    assert "W5A3" in message and "no-such-model" in message
    for line, part in (
        (1, "did you mean 'methods'"), (2, "seed is not an integer"), (4, "models is not a list of strings"),
        (5, "jobs is not an integer"), (6, "unknown key 'extra'"),
    ):  # fmt: skip
        assert f"{path}:{line}" in message
        assert part in message
    assert all(problem.fix for problem in caught.value.problems)


@pytest.mark.parametrize("text", ["methods = [", "a = 1\na = 2\n", "\x00"])
def test_broken_toml_is_one_plain_message(toml, text: str) -> None:
    with pytest.raises(HarnessError, match="broken TOML") as caught:
        read_toml(toml(text))
    assert caught.value.fix


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(HarnessError, match="cannot read"):
        read_toml(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(HarnessError, match="cannot read"):
        read_toml(binary)


def test_name_depends_on_what_is_asked_not_on_how_it_is_run() -> None:
    request = Request(methods=("rtn",), models=("org/model", "./my model"))
    assert request.name.startswith("model-my-model-")
    assert request_from({}, {"methods": ("rtn",), "models": request.models, "jobs": 4}).name == request.name
    assert request_from({}, {"methods": ("rtn",), "models": request.models, "seed": 1}).name != request.name
