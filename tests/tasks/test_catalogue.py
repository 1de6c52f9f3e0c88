from __future__ import annotations

import pytest

from harness.errors import HarnessError
from harness.tasks import lm_eval_index
from harness.tasks.catalogue import describe_tasks, parse_task, task_problems


def test_the_key_is_one_spelling_without_defaults():
    assert parse_task("wikitext2:windows=16:length=2048").key == "wikitext2:windows=16"
    assert parse_task("piqa:limit=100:fewshot=0").key == parse_task("piqa:fewshot=0:limit=100").key


def test_options_hold_all_values_and_kinds_follow_from_names():
    assert parse_task("c4_kl:windows=2").options == {"windows": 2, "length": 2048}
    assert [parse_task(text).kind for text in ("c4", "c4_kl", "mmlu", "pydoc_cloze")] == [
        "perplexity", "kl", "lm_eval", "lm_eval",
    ]  # fmt: skip
    assert parse_task("pydoc_kl").corpus == "pydoc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("piqqa", "piqa"),
        ("wikitext3", "wikitext2"),
        ("wikitext2:limit=3", "windows, length"),
        ("piqa:windows=3", "limit, fewshot"),
        ("wikitext2:windows=0", "too small"),
        ("wikitext2:length=1", "too small"),
        ("piqa:limit=0", "too small"),
        ("piqa:fewshot=-1", "too small"),
        ("piqa:limit=ten", "an integer"),
    ],
)
def test_mistakes_are_answered_with_a_fix(text, message):
    with pytest.raises(HarnessError, match=message) as caught:
        parse_task(text)
    assert caught.value.fix


def test_every_listed_task_parses():
    listed = [info for info in describe_tasks() if not info.name.startswith("<")]
    assert {parse_task(info.name).name for info in listed} == {info.name for info in listed}


def test_problems_name_what_is_missing_once(tmp_path):
    (tmp_path / "baber" / "piqa").mkdir(parents=True)
    texts = ("piqa", "arc_easy", "arc_easy:limit=2", "wikitext2", "wikitext2_kl", "pydoc")
    problems = task_problems([parse_task(text) for text in texts], tmp_path)
    assert len(problems) == 2
    assert "allenai/ai2_arc" in str(problems[0])
    assert "Salesforce" in str(problems[1])


def test_a_group_is_checked_through_its_members(tmp_path):
    assert lm_eval_index.datasets_of("mmlu") == ["cais/mmlu"]
    assert "cais/mmlu" in str(task_problems([parse_task("mmlu")], tmp_path)[0])


def test_nothing_is_missing_in_the_shared_data(shared_data):
    names = (
        "piqa arc_easy arc_challenge hellaswag winogrande boolq lambada_openai wikitext mmlu wikitext2 c4 pydoc_words"
    )
    assert task_problems([parse_task(name) for name in names.split()], shared_data) == []
