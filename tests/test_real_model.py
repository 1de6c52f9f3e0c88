"""The path on a real model with real outliers: what toy weights cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.corpora import evaluation_text
from harness.driver import quantize_model
from harness.models import LoadedModel, load_model
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.registry import create_method
from harness.settings import Setting
from harness.tasks.catalogue import parse_task
from harness.tasks.evaluate import evaluate

TASK = "pydoc:windows=2:length=512"


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> LoadedModel:
    return load_model(smollm2_folder, name="smollm2-135m")


def perplexity(model: LoadedModel) -> float:
    specs = [parse_task(TASK)]
    (result,) = evaluate(specs, model, reference=None, data_root=None, seed=0, progress=silent)
    return next(m.value for m in result.measurements if m.metric == "token_perplexity")


def test_full_precision_perplexity_is_that_of_a_plain_loop(model: LoadedModel) -> None:
    ids = torch.tensor(model.tokenizer(evaluation_text("pydoc", None))["input_ids"])
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        for window in ids[: 2 * 512].reshape(2, 512):
            total += 511 * model.module(input_ids=window[None], labels=window[None]).loss.double()
    assert perplexity(model) == pytest.approx(float((total / (2 * 511)).exp()), rel=1e-5)


def test_shared_inputs_of_a_grouped_query_model(model: LoadedModel) -> None:
    blocks = model.architecture.blocks
    assert len(blocks) == 30
    assert all([len(group) for group in block.shared_inputs] == [3, 1, 2, 1] for block in blocks)


def test_rounding_costs_what_it_costs(model: LoadedModel, smollm2_folder: Path, tmp_path: Path) -> None:
    """Known: bits per weight, and that per-channel W4A8 loses more than grouped W4A16; twice the same integers."""
    full_precision = perplexity(model)
    scores, results = {}, {}
    for setting in ("W4A16g64", "W4A8"):
        results[setting] = quantize_model(
            model, create_method("rtn", {}), Setting.parse(setting), None,
            seed=0, checkpoints=tmp_path / setting, progress=silent,
        )  # fmt: skip
        results[setting].save(tmp_path / f"{setting}.safetensors")
        other = load_model(smollm2_folder, name="smollm2-135m")
        QuantizedModel.load(tmp_path / f"{setting}.safetensors").install(other.module, other.architecture)
        scores[setting] = perplexity(other)
    assert results["W4A16g64"].bits_per_weight == pytest.approx(4 + 16 / 64 + 4 / 64)
    assert full_precision < scores["W4A16g64"] < scores["W4A8"] < 3 * full_precision
    again = quantize_model(
        model, create_method("rtn", {}), Setting.parse("W4A8"), None,
        seed=0, checkpoints=tmp_path / "again", progress=silent,
    )  # fmt: skip
    again.save(tmp_path / "again.safetensors")
    assert again.linears.keys() == results["W4A8"].linears.keys()
    assert all(torch.equal(q.codes, again.linears[n].codes) for n, q in results["W4A8"].linears.items())
