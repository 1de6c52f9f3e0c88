"""What a machine of a cluster does with a cell, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness import artifacts, memory
from harness.cells import Cell
from harness.checkpoint import open_checkpoint
from harness.endings import Ending, Lost
from harness.executors import depot, node
from harness.executors.depot import Depot
from harness.limits import Limits
from harness.registry import describe_methods
from harness.runfolder import RunFolder

TASK = "pydoc:length=32:windows=2"


@pytest.fixture
def assignment(tiny_folder: Path, tmp_path: Path) -> node.Assignment:
    """Of a baseline cell, whose run folder is on a shared disk."""
    cell = Cell(
        model="tiny", model_path=str(tiny_folder), weights_sha256=open_checkpoint(tiny_folder).sha256(), method="fp",
        method_source="fp", method_sha256=describe_methods()["fp"].sha256, options={}, setting="W16A16",
        dtype="float32", device="cpu", seed=0, calibration="pydoc:2x32", calibration_sha256=None, tasks=(TASK,),
        data_root=None,
    )  # fmt: skip
    asked = {"cell": cell.to_json(), "attempt": 1, "threads": 1, "placement": memory.IN_MEMORY}
    run = RunFolder(tmp_path / "run")
    run.cell(cell.id).path.mkdir(parents=True)
    run.cell(cell.id).cell.write_text(json.dumps(asked))
    return node.Assignment(run.cell(cell.id).cell.read_bytes(), run.path, Limits(), node.libraries(), None)


def last(assignment: node.Assignment) -> Any:
    return list(node.compute(assignment, None))[-1]


def test_what_a_machine_lacks_is_told_with_its_name_and_the_path(
    assignment: node.Assignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    lost = last(moved(assignment, model_path="/no/such/model"))
    assert isinstance(lost, Lost)
    assert lost.reason == "node-7: the model is not on this machine (/no/such/model)"
    assert "data root" in last(moved(assignment, data_root="/no/such/data")).reason
    assert "other weights" in last(moved(assignment, weights_sha256="0" * 64)).reason
    older = dataclasses.replace(assignment, libraries={**assignment.libraries, "torch": "1.0"})
    assert "torch" in last(older).reason and "not 1.0" in last(older).reason
    elsewhere = dataclasses.replace(assignment, run=assignment.run.with_name("unmounted"))
    assert "not shared" in last(elsewhere).reason
    stale = dataclasses.replace(assignment, asked=assignment.asked.replace(b'"attempt": 1', b'"attempt": 2'))
    assert "not shared" in last(stale).reason


def test_a_cell_travels_through_a_depot(
    assignment: node.Assignment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "of-the-node"))
    home = RunFolder(assignment.run).cell(assignment.cell.id)
    away = dataclasses.replace(assignment, depot=Depot(f"file://{tmp_path}/depot"))
    happened = list(node.compute(away, None))
    assert isinstance(happened[-1], Ending)
    assert [path.name for path in home.path.iterdir()] == ["cell.json"]  # the machine never touched the run folder
    left: dict[str, str] = {}
    for event in happened[:-1]:
        assert isinstance(event, dict)
        left |= event.get("files", {})
    assert away.depot is not None
    away.depot.get(home, left)
    depot.enlist(home, away.depot, left)
    said = artifacts.result(home)
    assert said is not None and said["status"] == "ok"
    assert artifacts.measured("x", home, TASK)
    assert not list((tmp_path / "of-the-node" / "nodes").rglob("*.json"))  # nothing stays there

    # What was uploaded is found again by the next attempt, on whatever machine: nothing is left to compute.
    again = list(node.compute(dataclasses.replace(away, uploaded=left), None))
    assert isinstance(again[-1], Ending)
    assert not any(isinstance(event, dict) and event.get("event") == "measured" for event in again)

    for file in (tmp_path / "depot").rglob("quantized.json"):
        file.write_text("{}")
    shutil.rmtree(home.path / "tasks")
    (home.path / "quantized.json").unlink()
    with pytest.raises(depot.Infrastructure, match="not what was uploaded"):
        depot.fetch_missing(home)


def test_no_name_leads_out_of_a_cells_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).cell("0" * 16)
    for name in ("../x", "/etc/passwd", "a/../../x", ""):
        with pytest.raises(depot.Infrastructure):
            depot.inside(folder, name)


def moved(assignment: node.Assignment, **changes: Any) -> node.Assignment:
    asked = json.loads(assignment.asked)
    cell = dataclasses.replace(Cell.from_json(asked["cell"]), **changes)
    asked["cell"] = cell.to_json()
    written = json.dumps(asked)
    folder = RunFolder(assignment.run).cell(cell.id)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.cell.write_text(written)
    return dataclasses.replace(assignment, asked=written.encode())
