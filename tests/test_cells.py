"""The identity of a cell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.cells import Cell

CELL = Cell(
    model="tiny", model_path="/models/tiny", weights_sha256="a" * 64, method="gptq", method_source="gptq",
    method_sha256="b" * 64, options={"damp": 0.05, "act_order": False}, setting="W4A16g64", dtype="float32",
    device="cpu", seed=0, calibration="pydoc:4x64", calibration_sha256="c" * 64, tasks=("pydoc",), data_root=None,
)  # fmt: skip


def test_id_is_what_it_was() -> None:
    assert CELL.id == "94cce3e42167ac3b"  # another value here makes every finished run start anew: raise FORMAT with it


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "d" * 64}, {"method": "rtn"}, {"method_sha256": "d" * 64}, {"options": {"damp": 0.05}},
        {"setting": "W4A16"}, {"dtype": "bfloat16"}, {"seed": 1}, {"calibration_sha256": None},
    ],
)  # fmt: skip
def test_whatever_decides_the_integers_changes_the_id(change: dict[str, object]) -> None:
    assert replace(CELL, **change).id != CELL.id


@pytest.mark.parametrize(
    "change",
    [
        {"model_path": "/elsewhere"}, {"tasks": ("c4", "piqa")}, {"data_root": "/data"}, {"model": "alias"},
        {"options": {"act_order": False, "damp": 0.05}},
    ],
)  # fmt: skip
def test_whatever_does_not_leaves_it(change: dict[str, object]) -> None:
    assert replace(CELL, **change).id == CELL.id


def test_json_and_back() -> None:
    value = json.loads(json.dumps(CELL.to_json()))
    assert Cell.from_json(value) == CELL
    with pytest.raises(ValueError, match="identity"):
        Cell.from_json(value | {"seed": 7})


def test_label_names_the_options() -> None:
    assert CELL.label == "gptq:act_order=false:damp=0.05"
    assert CELL.place == ("tiny", "W4A16g64", CELL.label)
