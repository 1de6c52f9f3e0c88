"""Numbers that stay what they are, whatever is changed beside them; and numbers that mean nothing, which are told."""

from __future__ import annotations

import copy

import pytest
import torch
from planted import cell, rounded, write_run

from harness import flags, results
from harness.driver import quantize_model
from harness.progress import silent
from harness.registry import create_method
from harness.settings import Setting
from harness.tasks import scoring
from harness.tasks.catalogue import parse_task
from harness.tasks.evaluate import evaluate

TASKS = ("pydoc_cloze:limit=6", "pydoc:length=32:windows=2")


def measured(model, tasks=TASKS) -> list[float]:
    found = evaluate(
        [parse_task(task) for task in tasks], model, reference=None, data_root=None, seed=0, progress=silent
    )
    return [m.value for result in found for m in result.measurements]


@pytest.mark.fault(15)
def test_15_variants_measured_in_turn_are_what_they_are_alone(tiny_model, figure) -> None:
    """In one process, with warm caches, there and back again."""
    variants = {}
    for text in ("W8A16", "W2A16"):
        variants[text] = copy.deepcopy(tiny_model)
        rounded(tiny_model, Setting.parse(text)).install(variants[text].module, variants[text].architecture)
    rounds = [(text, measured(variants[text])) for text in ("W8A16", "W2A16", "W8A16", "W2A16")]
    first = dict(rounds[:2])
    assert first["W8A16"] != first["W2A16"]
    wrong = sum(values != first[text] for text, values in rounds)
    assert wrong == 0
    figure(15, f"{wrong} of {len(rounds)} evaluations reused another's answers")


@pytest.mark.fault(20)
def test_20_a_model_that_says_nothing_is_told(tiny_model, tmp_path, figure) -> None:
    """All logits equal: the scores are kept, and flagged."""
    with torch.no_grad():
        tiny_model.module.lm_head.weight.zero_()
    task = parse_task("pydoc_cloze:limit=60")
    (found,) = evaluate([task], tiny_model, reference=None, data_root=None, seed=0, progress=silent)
    run = write_run(tmp_path, [(cell("W2A16", [task.key]), [found])])
    lines = flags.no_better_than_guessing(results.load(run), run)
    assert len(results.load(run)[0].tasks[task.key]) == 2
    assert [("acc" in line, "no better than guessing, which scores 0.2500" in line) for line in lines] == [
        (True, True)
    ] * 2
    figure(20, "all logits equal: 2 of 2 accuracies kept and flagged")


@pytest.mark.fault(25)
def test_25_the_same_integers_whatever_comes_before_and_beside(tiny_model, tmp_path, monkeypatch, figure) -> None:
    """Five times the same cell: after others, after other random draws, on eight threads, scored in other batches."""
    ids = torch.randint(2, 500, (6, 48), generator=torch.Generator().manual_seed(0))
    setting, threads = Setting.parse("W4A8g32"), torch.get_num_threads()

    def integers(name: str, times: int):
        return quantize_model(
            tiny_model, create_method(name, {}), setting, ids, seed=0, checkpoints=tmp_path / f"{name}-{times}",
            progress=silent,
        )  # fmt: skip

    runs, scores = [], []
    for times in range(5):
        torch.manual_seed(times)
        torch.set_num_threads(8 if times == 4 else 1)
        monkeypatch.setitem(scoring._BUDGET, "cpu", 2048 if times < 3 else 256)
        order = ("rtn", "gptq") if times % 2 else ("gptq", "rtn")
        try:
            found = {name: integers(name, times) for name in order}
            model = copy.deepcopy(tiny_model)
            found["gptq"].install(model.module, model.architecture)
            if times in (0, 3, 4):
                scores.append(measured(model))
        finally:
            torch.set_num_threads(threads)
        runs.append(found)
    same = [
        all(
            torch.equal(getattr(run[name].linears[layer], part), getattr(first, part))
            for name in run for layer, first in runs[0][name].linears.items() for part in ("codes", "scales", "zeros")
        )
        for run in runs
    ]  # fmt: skip
    delta = max(abs(a - b) / abs(b) for run in scores for a, b in zip(run, scores[0], strict=True))
    assert all(same)
    assert delta < 1e-6
    figure(
        25,
        f"integers equal in {sum(same)} of {len(same)} runs (one on 8 threads), scores differ by {delta:.1e} at most",
    )
