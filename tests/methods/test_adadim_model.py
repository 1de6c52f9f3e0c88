"""AdaDim over whole models: what it answers, saves, reports and resumes, and modules judged by a naive version too."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.architecture import Block
from harness.driver import quantize_model
from harness.method import Report
from harness.methods.adadim import AXES, AdaDim, modules_around
from harness.methods.gptq import GPTQ
from harness.methods.rtn import RTN
from harness.models import LoadedModel, load_model
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec, WeightFormat, decode, encode, find_grid, simulate_tokens
from harness.settings import Setting

CALIBRATION = torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(0))


def quantize(model: LoadedModel, method: object, folder: Path, setting: str = "W3A16g16") -> QuantizedModel:
    return quantize_model(
        model,
        method,  # type: ignore[arg-type]
        Setting.parse(setting),
        CALIBRATION,
        seed=0,
        checkpoints=folder,
        progress=silent,
    )


def same(one: QuantizedModel, other: QuantizedModel) -> bool:
    return one.linears.keys() == other.linears.keys() and all(
        torch.equal(getattr(one.linears[n], part), getattr(other.linears[n], part))
        for n in one.linears
        for part in ("codes", "scales", "zeros")
    )


def timeless(report: tuple[Report, ...]) -> list[Report]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in report]


def distance(model: LoadedModel, quantized: QuantizedModel) -> float:
    """Mean squared difference of the logits that quantization makes."""
    reference = model.module(input_ids=CALIBRATION).logits
    other = load_model(model.path, name=model.name)
    quantized.install(other.module, model.architecture)
    return float((other.module(input_ids=CALIBRATION).logits - reference).square().mean())


OTHERWISE = {
    "act_order": False,
    "block_size": 32,
    "damp": 0.1,
    "clip_search": True,
    "propagate_error": False,
    "true_sequential": False,
}


@pytest.mark.parametrize("setting", ["W3A16g16", "W4A8g16sym"])
def test_with_one_axis_it_is_its_base(tiny_model: LoadedModel, tmp_path: Path, setting: str) -> None:
    pairs = [
        (AdaDim(base="gptq", axes="oc"), GPTQ()),
        (AdaDim(base="gptq", axes="ic"), GPTQ(axis="ic")),
        (AdaDim(base="gptq", axes="oc", select_with="gptq"), GPTQ()),
        (AdaDim(axes="oc", **OTHERWISE), GPTQ(**OTHERWISE)),  # type: ignore[arg-type]
        (AdaDim(base="rtn", axes="oc"), RTN()),
    ]
    for i, (ada, base) in enumerate(pairs):
        one, other = (quantize(tiny_model, m, tmp_path / f"{i}{type(m).__name__}", setting) for m in (ada, base))
        assert same(one, other)


@pytest.mark.parametrize("setting", ["W3A16g16", "W4A4KV4g16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": "rtn"},
        {"select_with": "gptq"},
        {"objective": "module"},
        {"objective": "module", "reference": "greedy", "propagate_error": False, "true_sequential": False},
        {"axes": "ic"},
        {"propagate_error": False},
        {"true_sequential": False},
        {"damp": 0.1, "block_size": 16, "act_order": False, "clip_search": False},
    ],
)
def test_every_option_runs_and_gives_the_same_integers_twice(
    tiny_model: LoadedModel, tmp_path: Path, options: dict[str, object], setting: str
) -> None:
    method = AdaDim(**options)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in tiny_model.module.named_parameters()}
    first, again = (quantize(tiny_model, method, tmp_path / name, setting) for name in "ab")
    assert same(first, again) and timeless(first.report) == timeless(again.report)
    assert distance(tiny_model, first) < 1.2 * distance(tiny_model, quantize(tiny_model, RTN(), tmp_path, setting))
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.module.named_parameters())
    assert not any(module._forward_pre_hooks for module in tiny_model.module.modules())


def test_report_says_how_each_layer_was_decided(tiny_model: LoadedModel, tmp_path: Path) -> None:
    method = AdaDim(objective="module", reference="greedy")
    result = quantize(tiny_model, method, tmp_path, "W4A8g16")
    json.dumps(result.report, allow_nan=False)
    assert [row["layer"] for row in result.report] == list(tiny_model.architecture.linears)
    for row in result.report:
        kind = row["layer"].rpartition(".")[2]
        at_module = kind in {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        assert row["objective"] == ("module" if at_module else "linear")
        assert row["reference"] == ("greedy" if at_module else "full_precision")
        assert (row["base"], row["select_with"], row["tokens"]) == ("gptq", "rtn", 192)
        assert row["integer_kernel"] == (row["axis"] == "oc") == (result.linears[row["layer"]].axis == "oc")
        assert row["damp_used"] == 0.01 and not row["fallback"] and row["dead_columns"] == 0
        assert row["error"] > 0 and row["rtn_error"] > 0 and 0 <= row["select_seconds"] <= row["seconds"]
    assert {row["axis"] for row in result.report} == {"oc", "ic"}
    plain = quantize(tiny_model, AdaDim(base="rtn"), tmp_path / "rtn", "W4A16g16").report
    assert all(row["integer_kernel"] is None and row["error"] == row["rtn_error"] for row in plain)
    assert all(row["error"] == min(row["err_oc"], row["err_ic"]) for row in plain)


def test_layers_along_inputs_run_with_quantized_activations(tiny_model: LoadedModel, tmp_path: Path) -> None:
    result = quantize(tiny_model, AdaDim(axes="ic"), tmp_path / "ic", "W4A8g16")
    assert {linear.axis for linear in result.linears.values()} == {"ic"}
    assert all(linear.activation == ActivationSpec(8) for linear in result.linears.values())
    assert not any(row["integer_kernel"] for row in result.report)
    weights_only = quantize(tiny_model, AdaDim(axes="ic"), tmp_path / "a16", "W4A16g16")
    assert distance(tiny_model, result) < 1.5 * distance(tiny_model, weights_only)


def test_resumed_walk_is_bit_equal(tiny_model: LoadedModel, tmp_path: Path) -> None:
    method = AdaDim(objective="module")
    whole = quantize(tiny_model, method, tmp_path / "whole")
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "00000.safetensors").write_bytes((tmp_path / "whole" / "00000.safetensors").read_bytes())
    resumed = quantize(tiny_model, method, partial)
    assert same(resumed, whole) and timeless(resumed.report) == timeless(whole.report)


# The module objective.


def test_linears_are_judged_at_the_module_around_them(tiny_model: LoadedModel) -> None:
    around = modules_around(tiny_model.architecture.blocks[:1])
    assert {name.removeprefix("model.layers.0."): module for name, module in around.items()} == {
        "self_attn.q_proj": "model.layers.0.self_attn",
        "self_attn.k_proj": "model.layers.0.self_attn",
        "self_attn.v_proj": "model.layers.0.self_attn",
        "mlp.gate_proj": "model.layers.0.mlp",
        "mlp.up_proj": "model.layers.0.mlp",
    }
    flat = Block("b", (("b.attn.qkv",), ("b.attn.out",), ("b.fc1",), ("b.fc2",)), (), False)
    assert modules_around([flat]) == {"b.attn.qkv": "b.attn"}


def recorded(model: LoadedModel, name: str) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of the module ``name`` when the untouched model reads the whole calibration text at once."""
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    module = model.module.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model.module(input_ids=CALIBRATION, use_cache=False)
    hook.remove()
    return calls[0]


def output(module: nn.Module, call: tuple[tuple[object, ...], dict[str, object]]) -> torch.Tensor:
    result = module(*call[0], **call[1])
    return (result[0] if isinstance(result, tuple) else result).double()


def naive_errors(
    model: LoadedModel, greedy: bool, activation: ActivationSpec | None, format: dict[str, WeightFormat]
) -> Iterator[tuple[str, dict[str, float]]]:
    """By copying modules and overwriting weights, one linear and one axis at a time, all samples at once."""
    for block in model.architecture.blocks:
        for parent, children in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            call = recorded(model, f"{block.name}.{parent}")
            state = copy.deepcopy(model.module.get_submodule(f"{block.name}.{parent}"))
            for child in children:
                errors = {}
                candidates = {}
                for axis in AXES:
                    candidates[axis] = copy.deepcopy(state)
                    linear = candidates[axis].get_submodule(f"{child}_proj")
                    grid = find_grid(linear.weight.data, format[axis])
                    linear.weight.data = decode(encode(linear.weight.data, grid), grid)
                    if activation is not None:
                        linear.register_forward_pre_hook(lambda _, args: (simulate_tokens(args[0], activation),))
                    errors[axis] = float((output(candidates[axis], call) - output(state, call)).square().mean())
                if greedy:
                    state = candidates["oc" if errors["oc"] <= errors["ic"] else "ic"]
                yield f"{block.name}.{parent}.{child}_proj", errors


@pytest.mark.parametrize("setting", ["W3A16g16", "W4A8g16"])
@pytest.mark.parametrize("reference", ["full_precision", "greedy"])
@pytest.mark.parametrize("chunk_tokens", [2048, 64])
def test_module_errors_are_those_of_the_naive_version(
    tiny_model: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    reference: str,
    chunk_tokens: int,
) -> None:
    monkeypatch.setattr("harness.window.CHUNK_TOKENS", chunk_tokens)
    method = AdaDim(
        base="rtn",
        objective="module",
        reference=reference,  # type: ignore[arg-type]
        propagate_error=False,
        true_sequential=False,
    )
    result = quantize(tiny_model, method, tmp_path, setting)
    rows = {row["layer"]: row for row in result.report if row["objective"] == "module"}
    parsed = Setting.parse(setting)
    formats = {axis: WeightFormat.of(parsed, axis) for axis in AXES}
    naive = dict(naive_errors(tiny_model, reference == "greedy", ActivationSpec.of(parsed), formats))
    assert rows.keys() == naive.keys() and len(rows) == 10
    for name, errors in naive.items():
        for axis in AXES:
            assert rows[name][f"err_{axis}"] == pytest.approx(errors[axis], rel=1e-3)
        assert rows[name]["axis"] == ("oc" if errors["oc"] <= errors["ic"] else "ic")


def test_order_matters_only_to_the_greedy_reference(tiny_model: LoadedModel, tmp_path: Path) -> None:
    rows = {
        reference: {
            row["layer"].removeprefix("model.layers.0.self_attn."): row
            for row in quantize(
                tiny_model,
                AdaDim(base="rtn", objective="module", reference=reference),  # type: ignore[arg-type]
                tmp_path / reference,
            ).report
        }
        for reference in ("full_precision", "greedy")
    }
    plain, greedy = rows["full_precision"], rows["greedy"]
    assert plain["q_proj"]["err_oc"] == greedy["q_proj"]["err_oc"]
    assert plain["k_proj"]["err_oc"] != greedy["k_proj"]["err_oc"]
    assert plain["v_proj"]["err_oc"] != greedy["v_proj"]["err_oc"]
