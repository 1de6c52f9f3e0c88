"""One variant's results are never another's."""

from __future__ import annotations

import copy

import pytest


@pytest.mark.fault(15, 25)
def test_15_variants_measured_in_turn_are_what_they_are_alone(tiny_model, figure) -> None:
    """In one process, with warm caches, there and back again; the same seed gives the same integers each time."""
    import torch
    from planted import rounded

    from harness.progress import silent
    from harness.settings import Setting
    from harness.tasks.catalogue import parse_task
    from harness.tasks.evaluate import evaluate

    tasks = [parse_task("pydoc_cloze:limit=6"), parse_task("pydoc:length=32:windows=2")]
    variants = {}
    for text in ("W8A16", "W2A16"):
        variants[text] = copy.deepcopy(tiny_model)
        quantized, again = (rounded(tiny_model, Setting.parse(text)) for _ in range(2))
        assert all(torch.equal(quantized.linears[n].codes, again.linears[n].codes) for n in quantized.linears)
        quantized.install(variants[text].module, variants[text].architecture)

    def measured(text: str) -> list[float]:
        found = evaluate(tasks, variants[text], reference=None, data_root=None, seed=0, progress=silent)
        return [m.value for result in found for m in result.measurements]

    rounds = [(text, measured(text)) for text in ("W8A16", "W2A16", "W8A16", "W2A16")]
    first = dict(rounds[:2])
    assert first["W8A16"] != first["W2A16"]
    wrong = sum(values != first[text] for text, values in rounds)
    assert wrong == 0
    figure(15, f"{wrong} of {len(rounds)} evaluations reused another's answers")
