"""GPTQ on a whole small model: closer than rounding, the same integers twice, every option at work."""

from pathlib import Path

import pytest
import torch
from gptq_problems import random

from harness.driver import quantize_model
from harness.methods.gptq import GPTQ, _stacks
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import WeightFormat
from harness.settings import Setting

CALIBRATION = torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(0))


def quantize(model: LoadedModel, folder: Path, setting: str = "W4A16g16", **options: object) -> QuantizedModel:
    method = GPTQ(**options)  # type: ignore[arg-type]
    return quantize_model(
        model, method, Setting.parse(setting), CALIBRATION, seed=0, checkpoints=folder, progress=silent
    )


def distance(model: LoadedModel, quantized: QuantizedModel) -> float:
    """Mean squared difference of the logits that quantization makes."""
    from harness.models import load_model

    reference = model.module(input_ids=CALIBRATION).logits
    other = load_model(model.path, name=model.name)
    quantized.install(other.module, model.architecture)
    return float((other.module(input_ids=CALIBRATION).logits - reference).square().mean())


@pytest.mark.parametrize("setting", ["W4A16g16", "W3A16", "W4A8g16", "W2A16g16", "W4A4KV4", "W3A16g16sym"])
def test_whole_model_is_closer_than_rounding(tiny_model: LoadedModel, tmp_path: Path, setting: str) -> None:
    from harness.methods.rtn import RTN

    rtn = quantize_model(
        tiny_model, RTN(), Setting.parse(setting), None, seed=0, checkpoints=tmp_path / "rtn", progress=silent
    )
    gptq = quantize(tiny_model, tmp_path / "gptq", setting)
    assert distance(tiny_model, gptq) < distance(tiny_model, rtn)
    assert len(gptq.report) == 14 and all(row["tokens"] == 192 and not row["fallback"] for row in gptq.report)


@pytest.mark.parametrize(
    "options",
    [
        {"true_sequential": False},
        {"propagate_error": False},
        {"static_groups": False, "act_order": False},
        {"group_aware": True},
        {"axis": "ic"},
        {"qronos_alpha": 0.5},
        {"foem_beta": 0.2},
        {"best_of_rtn": True},
        {"clip_search": True},
    ],
)
def test_every_option_changes_the_integers_and_still_works(
    tiny_model: LoadedModel, tmp_path: Path, options: dict[str, object]
) -> None:
    plain, other = quantize(tiny_model, tmp_path / "a"), quantize(tiny_model, tmp_path / "b", **options)
    again = quantize(tiny_model, tmp_path / "c", **options)
    name = tiny_model.architecture.blocks[1].linears[-1]
    assert torch.equal(other.linears[name].codes, again.linears[name].codes)
    changed = not torch.equal(plain.linears[name].codes, other.linears[name].codes)
    assert changed or options == {"best_of_rtn": True}  # where GPTQ wins everywhere, that option keeps it
    assert distance(tiny_model, other) < 2 * distance(tiny_model, plain)


def test_each_linear_is_judged_against_its_own_rounding(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Linears that share an input are solved together, unless what is kept is decided for each."""
    weights = {"q": random(64, 32), "k": random(1, 32)}
    assert _stacks(weights, WeightFormat(4, 16), apart=True) == [("q",), ("k",)]
    assert _stacks(weights, WeightFormat(4, 16), apart=False) == [("q", "k")]
    kept = quantize(tiny_model, tmp_path, "W4A16g16", best_of_rtn=True)
    by_layer = {row["layer"]: row for row in kept.report}
    for row in by_layer.values():
        assert row["error_ratio"] <= 1, row


def test_groups_along_the_outputs_do_not_run_across_linears(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Per input channel, q, k and v have a scale each, though they are solved from one Hessian."""
    quantized = quantize(tiny_model, tmp_path / "a", "W3A16", axis="ic")
    for name, linear in quantized.linears.items():
        assert tuple(linear.scales.shape) == (1, linear.codes.shape[1]), name
    worse = quantize(tiny_model, tmp_path / "b", "W2A16", axis="ic")
    assert distance(tiny_model, quantized) < distance(tiny_model, worse)


def test_unsupported_combinations_say_what_to_do() -> None:
    setting = Setting.parse("W4A16g64")
    assert "group_aware=true" in str(GPTQ(static_groups=False).supports(setting))
    assert "propagate_error=true" in str(GPTQ(qronos_alpha=1.0, propagate_error=False).supports(setting))
    assert "group_aware=false" in str(GPTQ(group_aware=True).supports(Setting.parse("W4A16")))
    assert "group_aware=false" in str(GPTQ(group_aware=True, axis="ic").supports(setting))
    for wrong in ({"block_size": 0}, {"damp": -0.5}, {"qronos_alpha": 2.0}, {"foem_beta": -0.1}):
        assert GPTQ(**wrong).supports(setting)  # type: ignore[arg-type]
    assert "W2 to W8" in str(GPTQ().supports(Setting.parse("W16A8")))
    assert GPTQ(static_groups=False, act_order=False).supports(setting) is None
