from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from harness.errors import BadOutput, HarnessError
from harness.progress import silent
from harness.reports.outcomes import Mismatch, outcomes_of
from harness.reports.statistics import compare
from harness.tasks import lm_eval_loading, pydoc_cloze, pydoc_words
from harness.tasks.catalogue import parse_task
from harness.tasks.lm_eval import run_lm_eval
from harness.tasks.lm_eval_loading import load_tasks


def run(model, text, data_root=None, progress=silent):
    return run_lm_eval(parse_task(text), model, data_root, 0, progress)


def by_metric(result):
    return {measurement.metric: measurement for measurement in result.measurements}


@pytest.fixture
def lm_evals_own(tiny_model, monkeypatch):
    """What ``lm_eval.simple_evaluate`` says with its own HFLM on the same model."""
    for slow in ("add_env_info", "add_tokenizer_info"):
        monkeypatch.setattr(f"lm_eval.evaluator.{slow}", lambda *_: None)

    def evaluate(tasks, **options):
        lm = HFLM(pretrained=tiny_model.module, tokenizer=tiny_model.tokenizer, batch_size=3)
        manager = TaskManager(include_defaults=False)
        return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **options)

    return evaluate


def test_multiple_choice_equals_lm_evals_own(tiny_model, lm_evals_own):
    theirs = lm_evals_own([pydoc_cloze.config()], limit=20)
    ours = by_metric(run(tiny_model, "pydoc_cloze:limit=20"))
    expected = theirs["results"]["pydoc_cloze"]
    for metric in ("acc", "acc_norm"):
        assert ours[metric].value == expected[f"{metric},none"]
        assert ours[metric].stderr == expected[f"{metric}_stderr,none"]
    samples = theirs["samples"]["pydoc_cloze"]
    likelihoods = np.array([[answer[0] for answer in sample["filtered_resps"]] for sample in samples])
    np.testing.assert_allclose(ours["acc"].samples["loglikelihood"], likelihoods, atol=1e-4)
    assert ours["acc"].samples["value"].tolist() == [sample["acc"] for sample in samples]
    assert bytes(ours["acc"].samples["doc_hash"][5]).hex() == samples[5]["doc_hash"]
    assert ours["acc"].samples["doc_id"].tolist() == list(range(20))


def test_word_perplexity_equals_lm_evals_own(tiny_model, lm_evals_own):
    theirs = lm_evals_own([pydoc_words.config()], limit=4)["results"]["pydoc_words"]
    result = run(tiny_model, "pydoc_words:limit=4")
    for metric, measurement in by_metric(result).items():
        assert measurement.value == pytest.approx(theirs[f"{metric},none"], rel=1e-6)
        assert measurement.stderr is None
        assert not measurement.higher_is_better
    words = by_metric(result)["word_perplexity"].samples["value"]
    assert math.exp(-words[:, 0].sum() / words[:, 1].sum()) == pytest.approx(theirs["word_perplexity,none"])


def test_a_task_of_the_data_root_equals_lm_evals_own(tiny_model, lm_evals_own, shared_data):
    tasks = list(load_tasks(parse_task("piqa"), shared_data)["tasks"].values())
    theirs = lm_evals_own(tasks, limit=10)["results"]["piqa"]
    result = run(tiny_model, "piqa:limit=10", shared_data)
    assert by_metric(result)["acc_norm"].value == theirs["acc_norm,none"]
    manifest = result.manifest["tasks"]["piqa"]
    assert (manifest["version"], manifest["dataset"], manifest["documents"]) == (1.0, "baber/piqa", 10)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("arc_easy", "acc_norm"),
        ("arc_challenge", "acc"),
        ("hellaswag", "acc"),
        ("winogrande", "acc"),
        ("boolq", "acc"),
        ("lambada_openai", "perplexity"),
        ("wikitext", "word_perplexity"),
    ],
)
def test_lm_evals_tasks_run_from_the_data_root(tiny_model, shared_data, name, metric):
    measurement = by_metric(run(tiny_model, f"{name}:limit=2", shared_data))[metric]
    assert measurement.n == 2
    assert len(measurement.samples["doc_hash"]) == 2


def test_a_group_gives_its_aggregate_and_every_member(tiny_model, shared_data):
    result = run(tiny_model, "mmlu_social_sciences:limit=2:fewshot=1", shared_data)
    measurements = by_metric(result)
    members = [metric for metric in measurements if "/" in metric]
    assert len(members) == 12
    total = measurements["acc"]
    assert total.n == 24
    assert total.value == pytest.approx(np.mean([measurements[member].value for member in members]))
    assert total.value == pytest.approx(total.samples["value"].mean())
    assert np.bincount(total.samples["member"]).tolist() == [2] * 12
    assert {task["fewshot"] for task in result.manifest["tasks"].values()} == {1}


def test_a_tag_gives_every_member(tiny_model, shared_data):
    measurements = by_metric(run(tiny_model, "ai2_arc:limit=2", shared_data))
    expected = {"arc_easy/acc", "arc_easy/acc_norm", "arc_challenge/acc", "arc_challenge/acc_norm"}
    assert set(measurements) == expected


def test_examples_without_a_split_to_take_them_from_are_refused(tiny_model, shared_data):
    with pytest.raises(HarnessError, match="no split at hand to take 2 examples"):
        run(tiny_model, "piqa:limit=2:fewshot=2", shared_data)


def test_a_data_root_that_lacks_the_dataset_is_named(tiny_model, tmp_path):
    with pytest.raises(HarnessError, match="task piqa cannot be loaded") as caught:
        run(tiny_model, "piqa", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_data_root_is_left_alone(tiny_model, shared_data):
    before = sorted(shared_data.rglob("*"))
    run(tiny_model, "winogrande:limit=1", shared_data)
    assert sorted(shared_data.rglob("*")) == before


def test_examples_for_a_task_defined_without_are_refused(tiny_model, monkeypatch):
    zero_shot = pydoc_cloze.config() | {"num_fewshot": 0}
    monkeypatch.setitem(lm_eval_loading._OFFLINE, "pydoc_cloze", lambda: zero_shot)
    with pytest.raises(HarnessError, match="defined without examples"):
        run(tiny_model, "pydoc_cloze:limit=2:fewshot=1")


def test_a_perplexity_beyond_floating_point_is_bad_output(tiny_model):
    with torch.no_grad():
        tiny_model.module.lm_head.weight.mul_(1e6)
    with pytest.raises(BadOutput):
        run(tiny_model, "pydoc_words:limit=1")


@pytest.mark.fault(19)
@pytest.mark.parametrize("text", ["pydoc_cloze:limit=3", "pydoc_words:limit=1"])
def test_nan_log_likelihoods_are_bad_output_not_a_score(tiny_model, text):
    with torch.no_grad():
        tiny_model.module.lm_head.weight[7, 3] = math.nan
    with pytest.raises(BadOutput, match="log-likelihoods are not finite"):
        run(tiny_model, text)


@pytest.fixture
def generation(monkeypatch):
    """A task that generates, in the place of ``pydoc_cloze``."""
    config = {key: value for key, value in pydoc_cloze.config().items() if not key.startswith("doc_to_choice")}
    config |= {
        "output_type": "generate_until",
        "doc_to_target": "topic",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    monkeypatch.setitem(lm_eval_loading._OFFLINE, "pydoc_cloze", lambda: config)


def test_generation_equals_lm_evals_own(tiny_model, lm_evals_own, generation):
    theirs = lm_evals_own([lm_eval_loading._OFFLINE["pydoc_cloze"]()], limit=3)["results"]["pydoc_cloze"]
    (measurement,) = run(tiny_model, "pydoc_cloze:limit=3").measurements
    assert measurement.value == theirs["exact_match,none"]
    assert measurement.samples["value"].shape == (3,)
    assert "loglikelihood" not in measurement.samples


def test_nan_while_generating_is_bad_output(tiny_model, generation):
    with torch.no_grad():
        tiny_model.module.lm_head.weight[7, 3] = math.nan
    with pytest.raises(BadOutput, match="while it generates"):
        run(tiny_model, "pydoc_cloze:limit=2")


def test_progress_counts_requests(tiny_model):
    seen = []
    run(tiny_model, "pydoc_cloze:limit=5", progress=lambda *args: seen.append(args))
    assert seen[0] == ("pydoc_cloze", 0, 20)
    assert seen[-1] == ("pydoc_cloze", 20, 20)


def test_the_manifest_says_how_it_was_measured(tiny_model):
    manifest = run(tiny_model, "pydoc_cloze:limit=2").manifest
    assert {"lm_eval", "add_bos_token", "special_tokens_added", "max_length", "tokens_at_once", "stderr"} <= set(
        manifest
    )
    json.dumps(manifest, allow_nan=False)


def test_bos_is_added_and_left_out_as_asked(tiny_model):
    """The tiny tokenizer adds none by itself."""
    with pytest.raises(HarnessError, match="adds no BOS token"):
        run(tiny_model, "pydoc_cloze:limit=2:bos=true")
    without = run(tiny_model, "pydoc_cloze:limit=2:bos=false")
    assert without.manifest["add_bos_token"] is False
    tiny_model.tokenizer._tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    with_it = run(tiny_model, "pydoc_cloze:limit=2:bos=true")
    assert (with_it.manifest["begins_with_bos"], without.manifest["begins_with_bos"]) == (True, False)
    likelihoods = [by_metric(found)["acc"].samples["loglikelihood"] for found in (with_it, without)]
    assert np.abs(likelihoods[0] - likelihoods[1]).max() > 0.01
    again = run(tiny_model, "pydoc_cloze:limit=2:bos=false")
    np.testing.assert_allclose(by_metric(again)["acc"].samples["loglikelihood"], likelihoods[1], atol=1e-4)


def test_the_chat_template_is_applied_and_needed(tiny_model):
    with pytest.raises(HarnessError, match="no chat template"):
        run(tiny_model, "pydoc_cloze:limit=2:chat=true")
    plain = run(tiny_model, "pydoc_cloze:limit=2")
    tiny_model.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    chat = run(tiny_model, "pydoc_cloze:limit=2:chat=true")
    assert len(chat.manifest["chat_template"]) == 64
    prompts = [found.manifest["tasks"]["pydoc_cloze"]["prompts_sha256"] for found in (plain, chat)]
    assert prompts[0] != prompts[1]
    with pytest.raises(Mismatch):
        compare(*(outcomes_of(by_metric(found)["acc"], found.manifest) for found in (plain, chat)))
