from __future__ import annotations

import pytest

from harness.errors import HarnessError
from harness.tasks.catalogue import parse_task
from harness.tasks.presets import PRESETS, expand


@pytest.mark.parametrize("name", PRESETS)
def test_every_task_of_a_preset_is_one(name):
    for task in PRESETS[name].tasks:
        parse_task(task)


def test_a_preset_stands_for_its_tasks_each_once():
    assert expand(["wikitext2", "ppl", "pydoc"]) == ("wikitext2", "c4", "pydoc")
    assert expand(["piqa", "piqa"]) == ("piqa", "piqa")  # a mistake of the user's, told elsewhere


def test_options_go_to_every_task_and_win():
    assert expand(["ppl:windows=16"]) == ("wikitext2:windows=16", "c4:windows=16")
    assert expand(["mmlu"]) == ("mmlu:fewshot=5",)
    assert expand(["mmlu:fewshot=0:limit=2"]) == ("mmlu:fewshot=0:limit=2",)


def test_options_that_cannot_be_read_are_told():
    with pytest.raises(HarnessError, match="not key=value"):
        expand(["zeroshot6:100"])
