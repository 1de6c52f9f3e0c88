from __future__ import annotations

import architectures
import pytest
import torch

from harness.driver import quantize_model
from harness.progress import silent
from harness.registry import create_method
from harness.settings import Setting
from harness.tasks import scoring
from harness.tasks.prefix_tree import Request
from harness.tasks.scoring import Scorer


def requests(longest=8, vocabulary=97):
    """Documents of three choices each, of which some begin alike; and a sequence that stands alone."""
    generator = torch.Generator().manual_seed(1)

    def words(count):
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    found = []
    for length in (2, 3, longest - 3):
        context, start = words(length), words(1)
        found += [Request.of(context, [*start, *words(2)], longest), Request.of(context, [*start, *words(1)], longest)]
        found.append(Request.of(context, words(3), longest))
    return [*found, Request.of(words(longest), words(4), longest)]


@torch.no_grad()
def one_by_one(module, wanted):
    """Log-likelihoods from a forward pass of each request alone."""
    answers = []
    for request in wanted:
        logits = module(torch.tensor([request.tokens]), use_cache=False).logits[0, -len(request.targets) :]
        targets = torch.tensor(request.targets)
        likelihood = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None]).sum().item()
        answers.append((likelihood, bool((logits.argmax(-1) == targets).all())))
    return answers


def check(scorer, wanted, tolerance=1e-4):
    answers = scorer.score(wanted, lambda _: None)
    expected = one_by_one(scorer.model.module, wanted)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    for (likelihood, _), (alone, _) in zip(answers, expected, strict=True):
        assert likelihood == pytest.approx(alone, abs=tolerance)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_requests_score_as_they_do_alone_on_every_architecture(name):
    scorer = Scorer.of(architectures.loaded(name))
    assert scorer.shares
    check(scorer, requests())
    check(scorer, requests(longest=24))  # beyond some models' sliding window


@pytest.mark.parametrize("setting", ["W4A8g32", "W4A4KV4g32"])
def test_quantized_activations_keys_and_values_score_as_they_do_alone(setting, tiny_model, tmp_path):
    method, parsed = create_method("rtn", {}), Setting.parse(setting)
    quantized = quantize_model(tiny_model, method, parsed, None, seed=0, checkpoints=tmp_path, progress=silent)
    quantized.install(tiny_model.module, tiny_model.architecture)
    scorer = Scorer.of(tiny_model)
    assert scorer.shares
    check(scorer, requests(longest=30, vocabulary=512), tolerance=1e-3)


def test_generation_reads_quantized_keys_and_values_from_the_cache_as_without_it(tiny_model, tmp_path):
    method, setting = create_method("rtn", {}), Setting.parse("W8A16KV4")
    quantized = quantize_model(tiny_model, method, setting, None, seed=0, checkpoints=tmp_path, progress=silent)
    quantized.install(tiny_model.module, tiny_model.architecture)
    ids = torch.arange(3, 20)[None]
    said = [
        tiny_model.module.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*said)


def test_greedy_answers_are_recognized(tiny_model):
    tokens = [5, 6, 7]
    said = tiny_model.module(torch.tensor([tokens])).logits[0, -1].argmax().item()
    wanted = [Request.of(tokens, [said], 64), Request.of(tokens, [said + 1], 64)]
    assert [greedy for _, greedy in Scorer.of(tiny_model).score(wanted, lambda _: None)] == [True, False]


def test_the_shared_beginning_is_computed_once(tiny_model):
    seen = []
    embedding = tiny_model.module.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    scorer = Scorer.of(tiny_model)
    seen.clear()
    context = list(range(3, 103))
    scorer.score([Request.of(context, [200 + n, 300], 500) for n in range(4)], lambda _: None)
    assert sum(seen) == 100 + 4
    hook.remove()


def test_the_head_sees_read_positions_only(tiny_model):
    seen = []
    hook = tiny_model.module.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    scorer = Scorer.of(tiny_model)
    seen.clear()
    scorer.score([Request.of(list(range(3, 103)), [200 + n, 300], 500) for n in range(4)], lambda _: None)
    assert sum(seen) == 1 + 4
    hook.remove()


def test_a_model_that_ignores_positions_is_found_out(tiny_model, monkeypatch):
    """Then every request is computed for itself, and the answers stay right."""
    forward = tiny_model.module.base_model.forward

    def deaf(*args, position_ids=None, **rest):
        return forward(*args, **rest)

    monkeypatch.setattr(tiny_model.module.base_model, "forward", deaf)
    scorer = Scorer.of(tiny_model)
    assert not scorer.shares
    check(scorer, requests(longest=30, vocabulary=512))


def test_progress_counts_every_request(tiny_model, monkeypatch):
    monkeypatch.setitem(scoring._BUDGET, "cpu", 40)
    counts = []
    wanted = requests(longest=30, vocabulary=512)
    Scorer.of(tiny_model).score(wanted, counts.append)
    assert sum(counts) == len(wanted)
    assert len(counts) > 1
