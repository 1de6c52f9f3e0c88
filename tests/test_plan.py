"""From words to cells: the order, the problems, and what a run folder accepts later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cells import Cell
from harness.errors import HarnessError, Problems
from harness.plan import complete, draft
from harness.planfile import ModelFacts, Plan, grown, read_plan, refuse_other_terms, write_plan
from harness.request import Request

FACTS = ModelFacts(Path("/m"), "a" * 64, "c" * 64, ("pydoc",))


@pytest.fixture
def request_(tiny_folder: Path) -> Request:
    return Request(
        methods=("rtn", "rtn:clip_search=true"), models=(str(tiny_folder),), settings=("W4A16g64", "W4A8"), device="cpu"
    )


def cells_of(request: Request, facts: ModelFacts = FACTS) -> list[Cell]:
    understood = draft(request)
    return complete(understood, {model.name: facts for model in understood.models})


def test_cells_come_by_setting_then_method_after_the_baseline(request_: Request) -> None:
    cells = cells_of(replace(request_, methods=("fp", *request_.methods)))
    assert [(cell.setting, cell.label) for cell in cells] == [
        ("W16A16", "fp"), ("W4A16g64", "rtn"), ("W4A16g64", "rtn:clip_search=true"), ("W4A8", "rtn"),
        ("W4A8", "rtn:clip_search=true"),
    ]  # fmt: skip
    assert len({cell.id for cell in cells}) == 5
    assert cells[0].calibration_sha256 is None
    assert {cell.calibration_sha256 for cell in cells[1:]} == {"c" * 64}
    assert {cell.dtype for cell in cells} == {"float32"}


def test_the_limit_is_for_tasks_that_have_one_and_do_not_say_it(request_: Request) -> None:
    tasks = ("pydoc", "pydoc_cloze", "pydoc_words:limit=3")
    cell = cells_of(replace(request_, tasks=tasks, limit=7))[0]
    assert cell.tasks == ("pydoc", "pydoc_cloze:limit=7", "pydoc_words:limit=3")


def test_a_method_by_its_file_is_known_by_its_name(request_: Request) -> None:
    file = Path(__file__).parent / "broken_methods" / "raises.py"
    cell = cells_of(replace(request_, methods=(str(file),)))[1]
    assert (cell.method, cell.method_source) == ("raises", str(file))


def test_a_broken_checkpoint_is_a_problem_before_anything_runs(
    request_: Request, tiny_folder: Path, tmp_path: Path
) -> None:
    whole = (tiny_folder / "model.safetensors").read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Problems, match="not a sound safetensors file") as caught:
        draft(replace(request_, models=(str(folder), "./nowhere"), seed=-1))
    assert len(caught.value.problems) == 3


def test_two_names_for_one_model_are_told(request_: Request, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tiny_folder)
    with pytest.raises(Problems, match="named twice"):
        draft(replace(request_, models=(str(tiny_folder), str(tmp_path / "alias"))))


def test_preset_on_its_own_grid_is_warned_about(request_: Request) -> None:
    warned = draft(replace(request_, models=("smollm2-135m",), settings=("W4A16g32", "W4A16g64"))).warnings
    assert len(warned) == 1
    assert "W4A16g32" in warned[0]


def test_a_plan_grows_and_keeps_its_order(request_: Request, tmp_path: Path) -> None:
    first = draft(replace(request_, methods=("rtn",), settings=("W4A8",)))
    name = first.models[0].name
    plan = grown(None, first, {name: FACTS}, complete(first, {name: FACTS}), tmp_path)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    stamp = (tmp_path / "plan.json").stat().st_mtime_ns
    write_plan(tmp_path / "plan.json", plan)
    assert (tmp_path / "plan.json").stat().st_mtime_ns == stamp  # not written again

    second = draft(replace(request_, tasks=("pydoc:windows=1",)))
    more = grown(plan, second, {name: FACTS}, complete(second, {name: FACTS}), tmp_path)
    assert [(cell.setting, cell.label) for cell in more.cells] == [
        ("W16A16", "fp"), ("W4A8", "rtn"), ("W4A8", "rtn:clip_search=true"), ("W4A16g64", "rtn"),
        ("W4A16g64", "rtn:clip_search=true"),
    ]  # fmt: skip
    assert more.cells[1].tasks == ("pydoc", "pydoc:windows=1")
    assert more.cells[1].id == plan.cells[1].id


def test_a_changed_method_takes_the_place_of_the_old_one(request_: Request, tmp_path: Path) -> None:
    asked = draft(replace(request_, methods=("rtn",), settings=("W4A8",)))
    name = asked.models[0].name
    plan = grown(None, asked, {name: FACTS}, complete(asked, {name: FACTS}), tmp_path)
    old = Plan(plan.terms, plan.facts, (plan.cells[0], replace(plan.cells[1], method_sha256="f" * 64, tasks=("c4",))))
    new = grown(old, asked, {name: FACTS}, plan.cells, tmp_path)
    assert new.cells == plan.cells


def test_other_terms_are_refused_all_at_once(request_: Request, tmp_path: Path) -> None:
    asked = draft(request_)
    name = asked.models[0].name
    plan = grown(None, asked, {name: FACTS}, complete(asked, {name: FACTS}), tmp_path)
    other = draft(replace(request_, seed=1, dtype="bfloat16", calibration="pydoc:3x64"))
    with pytest.raises(Problems, match="another --out") as caught:
        refuse_other_terms(plan, other, tmp_path)
    assert len(caught.value.problems) == 3
    for change in ({"weights_sha256": "b" * 64}, {"calibration_sha256": "b" * 64}):
        with pytest.raises(Problems, match="another --out"):
            grown(plan, asked, {name: replace(FACTS, **change)}, plan.cells, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', '{"format": 1, "terms": 3}'])
def test_a_plan_that_is_none_is_a_plain_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(HarnessError) as caught:
        read_plan(path)
    assert caught.value.fix


def test_an_edited_plan_is_noticed(request_: Request, tmp_path: Path) -> None:
    asked = draft(request_)
    name = asked.models[0].name
    write_plan(tmp_path / "plan.json", grown(None, asked, {name: FACTS}, complete(asked, {name: FACTS}), tmp_path))
    value = json.loads((tmp_path / "plan.json").read_text())
    value["cells"][1]["setting"] = "W8A8"
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(HarnessError, match="identity"):
        read_plan(tmp_path / "plan.json")
