from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from harness.corpora import evaluation_text
from harness.errors import BadOutput, HarnessError
from harness.models import LoadedModel
from harness.progress import silent
from harness.tasks.catalogue import parse_task
from harness.tasks.evaluate import evaluate
from harness.tasks.perplexity import evaluation_windows, head_is_all, measure_windows, score_windows

SMALL = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def measured(model, *texts, reference=None, data_root=None):
    specs = [parse_task(text) for text in texts]
    results = evaluate(specs, model, reference=reference, data_root=data_root, seed=0, progress=silent)
    return {result.task: result for result in results}


def plain_loop(model, text, length, windows):
    """Perplexity as a few lines of Transformers."""
    ids = model.tokenizer(text, return_tensors="pt").input_ids[0]
    losses = []
    for start in range(0, windows * length, length):
        window = ids[start : start + length]
        with torch.no_grad():
            logits = model.module(window[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1].double(), window[1:]).item())
    return math.exp(sum(losses) / len(losses))


@pytest.fixture
def perturbed(tiny_model):
    model = copy.copy(tiny_model)
    model.module = copy.deepcopy(tiny_model.module)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("length", [2, 300, 512])
def test_perplexity_equals_a_plain_loop(tiny_model, length):
    result = measured(tiny_model, f"pydoc:windows=3:length={length}")[f"pydoc:length={length}:windows=3"]
    (measurement,) = result.measurements
    expected = plain_loop(tiny_model, evaluation_text("pydoc", None), length, 3)
    assert measurement.value == pytest.approx(expected, rel=1e-5)
    assert measurement.metric == "token_perplexity"
    assert not measurement.higher_is_better


def test_per_window_values_are_kept_and_give_value_and_error(tiny_model):
    (measurement,) = measured(tiny_model, "pydoc:windows=5:length=64")["pydoc:length=64:windows=5"].measurements
    nll, tokens = measurement.samples["nll"], measurement.samples["tokens"]
    assert tokens.tolist() == [63] * 5
    assert measurement.value == pytest.approx(math.exp(nll.sum() / tokens.sum()), rel=1e-12)
    assert measurement.stderr == pytest.approx(measurement.value * np.std(nll / 63, ddof=1) / math.sqrt(5), rel=1e-12)


def test_kl_of_a_model_with_itself_is_exactly_0(tiny_model, tiny_folder):
    from harness.models import load_model

    def again():
        return load_model(tiny_folder, name="tiny", dtype="float32", device="cpu")

    for reference in (None, again):
        (result,) = measured(tiny_model, "pydoc_kl:windows=2:length=300", reference=reference).values()
        kl, agreement = result.measurements
        assert (kl.value, kl.stderr, agreement.value) == (0.0, 0.0, 1.0)


def test_kl_equals_its_definition(tiny_model, perturbed):
    (result,) = measured(perturbed, "pydoc_kl:windows=2:length=300", reference=lambda: tiny_model).values()
    kl, agreement = result.measurements
    windows = evaluation_windows("pydoc", 300, 2, tiny_model, None).ids
    with torch.no_grad():
        p = torch.log_softmax(tiny_model.module(windows).logits[:, :-1].double(), -1)
        q = torch.log_softmax(perturbed.module(windows).logits[:, :-1].double(), -1)
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    np.testing.assert_allclose(kl.samples["kl_divergence"], expected.numpy(), rtol=1e-4)
    assert kl.value == pytest.approx(expected.mean().item(), rel=1e-4)
    assert kl.value > 0
    assert agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_perplexity_and_kl_share_one_pass_and_one_reference(tiny_model, perturbed):
    passes = {"model": 0, "reference": 0, "loaded": 0}

    def counting(name):
        return lambda *_: passes.__setitem__(name, passes[name] + 1)

    def reference():
        passes["loaded"] += 1
        return tiny_model

    perturbed.module.base_model.register_forward_hook(counting("model"))
    tiny_model.module.base_model.register_forward_hook(counting("reference"))
    texts = ["pydoc:windows=4:length=64", "pydoc_kl:windows=3:length=64", "pydoc_kl:windows=1:length=32"]
    together = measured(perturbed, *texts, reference=reference)
    probes = 2  # each of the two passes tries the head on both models
    assert passes == {"model": 4 + 1 + probes, "reference": 3 + 1 + probes, "loaded": 1}
    alone = measured(perturbed, texts[0])
    assert passes["loaded"] == 1
    key = parse_task(texts[0]).key
    assert together[key].measurements[0].value == alone[key].measurements[0].value
    assert together[key].measurements[0].n == 4


def test_the_reference_is_not_loaded_without_a_kl_task(tiny_model):
    measured(tiny_model, "pydoc:windows=1:length=32", reference=lambda: pytest.fail("loaded"))


@pytest.mark.parametrize(
    ("architecture", "config", "plain"),
    [
        (OPTForCausalLM, OPTConfig(ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=128, **SMALL), True),
        (Gemma2ForCausalLM, Gemma2Config(intermediate_size=64, head_dim=16, num_key_value_heads=1, **SMALL), False),
    ],
)
def test_heads_that_do_more_than_multiply_are_found_out(architecture, config, plain):
    config.final_logit_softcapping = 0.5  # known to Gemma only
    torch.manual_seed(0)
    module = architecture(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(10)
    ids = torch.randint(3, 500, (1, 100))
    assert head_is_all(module, ids[:, :16]) is plain
    scores = score_windows(LoadedModel(module, None, "small", Path()), ids, None, lambda *_: None)
    with torch.no_grad():
        expected = F.cross_entropy(module(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    assert scores.nll[0] == pytest.approx(expected, rel=1e-5)
    assert ("full forward" in scores.head) is not plain


@pytest.mark.fault(19)
def test_nan_anywhere_is_bad_output_naming_the_window(tiny_model):
    tiny_model.module.lm_head.weight.data[7, 3] = math.nan
    with pytest.raises(BadOutput, match="window 0"):
        measured(tiny_model, "pydoc:windows=2:length=64")


def test_too_few_windows_are_refused_not_shortened(tiny_model):
    with pytest.raises(HarnessError, match="windows of 512 tokens, 99999 are asked") as caught:
        measured(tiny_model, "pydoc:windows=99999:length=512")
    assert "pydoc:windows=" in caught.value.fix


def test_windows_longer_than_the_model_takes_are_refused(tiny_model):
    with pytest.raises(HarnessError, match="takes at most 512 tokens"):
        measured(tiny_model, "pydoc:windows=1:length=513")


def test_all_windows_are_the_default(tiny_model):
    windows = evaluation_windows("pydoc", 512, None, tiny_model, None)
    assert len(windows.ids) == windows.manifest["windows_available"] == windows.manifest["tokens_in_text"] // 512


def test_the_manifest_says_how_it_was_measured(tiny_model):
    seen = []
    specs = [parse_task("pydoc:windows=1:length=32")]
    (result,) = measure_windows(specs, tiny_model, None, None, lambda *args: seen.append(args))
    assert {"text_sha256", "ids_sha256", "special_tokens_added", "window_rule", "stderr", "head", "python"} <= set(
        result.manifest
    )
    assert seen == [("pydoc", 0, 1), ("pydoc", 1, 1)]
