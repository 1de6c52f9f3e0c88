"""AdaDim's choices: the identities behind them, planted outliers that decide them, and naive versions beside them."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.architecture import Block
from harness.driver import quantize_model
from harness.errors import HarnessError
from harness.hessian import Hessian
from harness.linear import QuantizedLinear
from harness.method import Report
from harness.methods.adadim import AXES, AdaDim, Choice, ModuleErrors, modules_around, rounded
from harness.methods.gptq import GPTQ
from harness.methods.rtn import RTN
from harness.models import LoadedModel, load_model
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec, WeightFormat, decode, encode, find_grid, simulate_tokens
from harness.reconstruction import Factorization, factorize
from harness.registry import describe_methods
from harness.settings import Setting
from harness.window import Runner, SharedInput, Window

SEEDS = st.integers(0, 2**31)
BITS = st.sampled_from([2, 3, 4])
OPTIONS = st.sampled_from([{"base": "rtn"}, {"base": "gptq"}, {"base": "gptq", "select_with": "gptq"}])
W3 = Setting.parse("W3A16g64")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Activations whose channels differ in size, as those of a trained model do."""
    return random(tokens, features, seed=seed) * (1 + 10 * (torch.arange(features) % 7 == 3))


def quantize_shared(
    weights: dict[str, torch.Tensor], x: torch.Tensor, setting: Setting = W3, **options: object
) -> tuple[dict[str, QuantizedLinear], dict[str, Report]]:
    """What AdaDim makes of linears that all read ``x``, two chunks of it."""
    modules: dict[str, nn.Module] = {}
    for name, weight in weights.items():
        modules[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
        modules[name].weight.copy_(weight)
    runner = Runner(modules, {}, torch.float32)
    window = Window(0, (Block("block", (tuple(weights),), (), False),), runner, 0, lambda name: None)
    stop = SharedInput(tuple(weights), [part[None] for part in x.tensor_split(2)], runner, {})
    nowhere = ModuleErrors(window, setting, {}, {}, greedy=False)
    linears, report = AdaDim(**options).quantize_shared(window, stop, nowhere, setting)  # type: ignore[arg-type]
    return linears, {row["layer"]: row for row in report}


def output_error(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    """From the activations, in float64."""
    return float((x.double() @ (weight.double() - other.double()).T).square().mean())


def rounded_along(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    grid = find_grid(weight, format)
    return decode(encode(weight, grid), grid)


# Identities of the two axes.


@given(SEEDS, BITS, st.integers(0, 23), st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_scaling_one_column_changes_only_that_column(seed: int, bits: int, column: int, factor: float) -> None:
    weight, format = random(32, 24, seed=seed), WeightFormat(bits, 8, axis="ic")
    scaled = weight.clone()
    scaled[:, column] *= factor
    others = torch.arange(24) != column
    before, after = find_grid(weight, format), find_grid(scaled, format)
    assert torch.equal(encode(weight, before)[:, others], encode(scaled, after)[:, others])
    assert torch.equal(before.scales[:, others], after.scales[:, others])
    oc = WeightFormat(bits, 8)
    assert factor < 8 or not torch.equal(find_grid(weight, oc).scales, find_grid(scaled, oc).scales)


@given(SEEDS, BITS, st.booleans(), st.lists(st.integers(-2, 5), min_size=24, max_size=24))
@settings(deadline=None, max_examples=30)
def test_columns_scaled_by_powers_of_two_round_as_before(
    seed: int, bits: int, symmetric: bool, exponents: list[int]
) -> None:
    weight, format = random(32, 24, seed=seed), WeightFormat(bits, 16, symmetric, axis="ic")
    scale = 2.0 ** torch.tensor(exponents)
    assert torch.equal(rounded_along(weight * scale, format), rounded_along(weight, format) * scale)


@given(SEEDS, BITS, st.booleans(), st.booleans(), st.sampled_from([None, 8, 16]))
@settings(deadline=None, max_examples=30)
def test_input_axis_is_the_output_axis_of_the_transposed_weight(
    seed: int, bits: int, symmetric: bool, clip_search: bool, group_size: int | None
) -> None:
    weight = random(48, 32, seed=seed)
    ic = WeightFormat(bits, group_size, symmetric, "ic", clip_search)
    oc = WeightFormat(bits, group_size, symmetric, "oc", clip_search)
    grid, transposed = find_grid(weight, ic), find_grid(weight.T, oc)
    assert torch.equal(grid.scales, transposed.scales.T) and torch.equal(grid.zeros, transposed.zeros.T)
    assert torch.equal(encode(weight, grid), encode(weight.T, transposed).T)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.sampled_from([8, 16]))
@settings(deadline=None, max_examples=20)
def test_both_axes_have_the_same_number_of_groups(seed: int, rows: int, columns: int, size: int) -> None:
    weight = random(rows * size, columns * size, seed=seed)
    oc, ic = (find_grid(weight, WeightFormat(4, size, axis=axis)) for axis in AXES)
    assert oc.scales.numel() == ic.scales.numel() == weight.numel() // size
    assert ic.scales.shape == (rows, columns * size)


# The choice.


@given(SEEDS, st.sampled_from([64, 192]), st.sampled_from([64, 128]), BITS, OPTIONS, st.booleans())
@settings(deadline=None, max_examples=25)
def test_chosen_error_is_the_smaller_one(
    seed: int, out: int, inputs: int, bits: int, options: dict[str, str], plant: bool
) -> None:
    weight, x = random(out, inputs, seed=seed), with_outliers(300, inputs, seed=seed + 1)
    if plant:
        weight[:, 3::7] *= 0.1
    setting = Setting.parse(f"W{bits}A16g32")
    linears, report = quantize_shared({"a": weight}, x, setting, **options)
    row = report["a"]
    errors = {axis: row[f"err_{axis}"] for axis in AXES}
    assert row["axis"] == linears["a"].axis == ("oc" if errors["oc"] <= errors["ic"] else "ic")
    assert errors[row["axis"]] == min(errors.values())
    if options.get("select_with") == "gptq":
        assert row["error"] == pytest.approx(min(errors.values()), rel=1e-6)
    else:
        for axis in AXES:
            plain = rounded_along(weight, WeightFormat.of(setting, axis))
            assert errors[axis] == pytest.approx(output_error(x, weight, plain), rel=1e-4)


@given(SEEDS, st.sampled_from([64, 192]), st.sampled_from([64, 128]), BITS, st.sampled_from(AXES))
@settings(deadline=None, max_examples=25)
def test_error_from_the_hessian_is_the_error_from_the_activations(
    seed: int, out: int, inputs: int, bits: int, axis: str
) -> None:
    weight, x = random(out, inputs, seed=seed), with_outliers(300, inputs, seed=seed + 1)
    format = WeightFormat(bits, 32, axis=axis)  # type: ignore[arg-type]
    error = float(rounded(Hessian.of(x.split(100)), weight, format).error.mean())
    assert error == pytest.approx(output_error(x, weight, rounded_along(weight, format)), rel=1e-5)
    exact = (weight.double() - rounded_along(weight, format).double()) @ (x.double().T @ x.double())
    exact = (exact * (weight.double() - rounded_along(weight, format).double())).sum() / (300 * out)
    assert float(exact) == pytest.approx(output_error(x, weight, rounded_along(weight, format)), rel=1e-6)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_equal_errors_go_to_the_output_axis(one: float, other: float) -> None:
    assert Choice({"oc": one, "ic": one}).axis == "oc"
    assert Choice({"oc": one, "ic": other}).axis == ("ic" if other < one else "oc")
    assert Choice({"ic": one}).axis == "ic"


@pytest.mark.parametrize("options", [{"base": "rtn"}, {"base": "gptq"}, {"select_with": "gptq"}])
def test_a_layer_that_both_axes_hold_exactly_goes_to_the_output_axis(options: dict[str, str]) -> None:
    weight = (random(64, 64) > 0).float() * 7  # both levels of the 3-bit range 0..7
    linears, report = quantize_shared({"a": weight}, random(128, 64), **options)
    assert report["a"]["err_oc"] == report["a"]["err_ic"] == 0
    assert linears["a"].axis == "oc" and torch.equal(linears["a"].weight(), weight)


def planted(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, x = random(256, 256, seed=seed), random(512, 256, seed=seed + 1000)
    if kind == "row":
        weight[11] *= 20
    else:
        x[:, 37] *= 40
        weight[:, 37] *= 0.1 if kind == "small column" else 10
    return weight, x


@pytest.mark.parametrize(
    ("kind", "axis", "ratio"), [("small column", "ic", 0.40), ("row", "oc", 1.50), ("large column", "oc", 15.0)]
)
def test_planted_outliers_decide_the_axis_every_time(kind: str, axis: str, ratio: float) -> None:
    reports = [quantize_shared({"a": w}, x, base="rtn")[1]["a"] for w, x in (planted(kind, s) for s in range(20))]
    assert [row["axis"] for row in reports] == [axis] * 20
    assert np.mean([row["err_ic"] / row["err_oc"] for row in reports]) == pytest.approx(ratio, rel=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_chooses_along_its_own_errors_and_keeps_the_lower(seed: int) -> None:
    weight, x = random(64, 64, seed=seed), with_outliers(256, 64, seed=seed)
    x[:, 1:] += 0.7 * x[:, :-1]
    chosen, report = quantize_shared({"a": weight}, x, select_with="gptq")
    fixed = {axis: quantize_shared({"a": weight}, x, axes=axis) for axis in AXES}
    errors = {axis: row["a"]["error"] for axis, (_, row) in fixed.items()}
    best = "oc" if errors["oc"] <= errors["ic"] else "ic"
    assert (report["a"]["err_oc"], report["a"]["err_ic"]) == (errors["oc"], errors["ic"])
    assert report["a"]["error"] == errors[best]
    assert torch.equal(chosen["a"].codes, fixed[best][0]["a"].codes)


def test_an_axis_whose_groups_do_not_divide_the_layer_is_left_out() -> None:
    weights = {"a": random(96, 128), "b": random(64, 128, seed=1)}  # groups of 64 outputs fit b alone
    linears, report = quantize_shared(weights, random(300, 128), base="rtn")
    assert report["a"]["err_ic"] is None and linears["a"].axis == "oc"
    assert report["b"]["err_ic"] > 0
    tall, _ = quantize_shared({"a": random(128, 96)}, random(300, 96))
    assert tall["a"].axis == "ic"
    with pytest.raises(HarnessError, match=r"groups of 64 do not divide 96 outputs[\s\S]*g32"):
        quantize_shared(weights, random(300, 128), axes="ic")
    with pytest.raises(HarnessError, match="groups of 64 do not divide 96 inputs"):
        quantize_shared({"a": random(96, 96)}, random(300, 96))


def test_axes_that_are_excluded_are_not_chosen() -> None:
    weight, x = planted("small column", 0)
    linears, report = quantize_shared({"a": weight}, x, axes="oc")
    assert linears["a"].axis == "oc" and report["a"]["err_ic"] is None


# What quantizes along the axis.


def naive_gptq_ic(
    weight: torch.Tensor, x: torch.Tensor, damp: float, bits: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Along input channels in float64, largest diagonal first: codes and scales in the order of the layer."""
    w, h = weight.double().numpy().copy(), (x.double().T @ x.double()).numpy()
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable")
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    codes, scales = np.zeros(w.shape), np.zeros((len(w) // size, w.shape[1]))
    for step, column in enumerate(order):
        groups = w[:, column].reshape(-1, size)
        lo, hi = groups.min(1).clip(max=0), groups.max(1).clip(min=0)
        scale = ((hi - lo) / (2**bits - 1)).astype(np.float16).astype(float)
        zero = np.round(-lo / scale).clip(0, 2**bits - 1)
        code = np.clip(np.round(groups / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
        error = (groups - (code - zero[:, None]) * scale[:, None]).flatten() / u[step, step]
        codes[:, column], scales[:, column] = code.flatten(), scale
        w[:, order[step + 1 :]] -= np.outer(error, u[step, step + 1 :])
    return codes, scales


@pytest.mark.parametrize("bits", [3, 4])
def test_reordered_columns_come_back_with_their_scales(bits: int) -> None:
    weight, x = random(64, 48, seed=bits), with_outliers(256, 48)
    x[:, 1:] += 0.7 * x[:, :-1]
    linears, _ = quantize_shared({"a": weight}, x, Setting.parse(f"W{bits}A16g16"), axes="ic")
    codes, scales = naive_gptq_ic(weight, x, 0.01, bits, 16)
    assert (linears["a"].codes.numpy() == codes).mean() > 0.99  # a tie in float32 may fall the other way in float64
    assert np.isclose(linears["a"].scales.float().numpy(), scales, rtol=2e-3).mean() > 0.99


def test_linears_of_one_input_share_a_factor_and_a_call_for_each_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"solve": [], "factor": []}
    solve, factor = GPTQ.solve, Factorization.factor

    def counted_solve(self: GPTQ, weight: torch.Tensor, *rest: object) -> object:
        seen["solve"].append(len(weight))
        return solve(self, weight, *rest)  # type: ignore[arg-type]

    def counted_factor(self: Factorization, order: torch.Tensor) -> torch.Tensor:
        seen["factor"].append(len(order))
        return factor(self, order)

    monkeypatch.setattr(GPTQ, "solve", counted_solve)
    monkeypatch.setattr(Factorization, "factor", counted_factor)
    isolated, x = planted("small column", 0)
    together = planted("row", 1)[0]
    together[:, 37] *= 10
    weights = {"a": isolated, "b": together, "c": isolated + 0.001}
    linears, _ = quantize_shared(weights, x)
    assert [linears[name].axis for name in "abc"] == ["ic", "oc", "ic"]
    assert seen == {"solve": [256, 512], "factor": [256]}
    for calls in seen.values():
        calls.clear()
    quantize_shared(weights, x, select_with="gptq")
    assert seen == {"solve": [768, 768], "factor": [256]}


def test_a_stack_gives_what_single_linears_give() -> None:
    weights = {name: random(128, 64, seed=i) for i, name in enumerate("abc")}
    x = with_outliers(256, 64)
    for group in ("g64", ""):
        setting = Setting.parse(f"W3A16{group}")
        for axis in AXES:
            stacked, _ = quantize_shared(weights, x, setting, axes=axis)
            for name, weight in weights.items():
                single, _ = quantize_shared({name: weight}, x, setting, axes=axis)
                assert (stacked[name].codes != single[name].codes).float().mean() < 2e-3
                assert stacked[name].scales.shape == single[name].scales.shape


def test_activation_quantization_is_part_of_the_error() -> None:
    weight, x, setting = random(64, 64), with_outliers(256, 64), Setting.parse("W4A4g32")
    _, report = quantize_shared({"a": weight}, x, setting, base="rtn")
    seen = simulate_tokens(x, ActivationSpec(4))
    for axis in AXES:
        plain = rounded_along(weight, WeightFormat.of(setting, axis))
        assert report["a"][f"err_{axis}"] == pytest.approx(output_error(seen, weight, plain), rel=1e-4)


def test_dead_columns_do_not_spoil_the_grids_that_are_compared() -> None:
    weight, x = random(64, 64), random(256, 64)
    x[:, 5] = 0
    spoilt = weight.clone()
    spoilt[:, 5] = 100
    clean = quantize_shared({"a": weight}, x)[1]["a"]
    row = quantize_shared({"a": spoilt}, x)[1]["a"]
    assert row["dead_columns"] == 1
    assert (row["err_oc"], row["err_ic"]) == (clean["err_oc"], clean["err_ic"])


# Whole models.

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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_saved_codes_of_both_axes_come_back_bit_by_bit(bits: int, tmp_path: Path) -> None:
    weights = {"oc": random(96, 64), "ic": random(96, 64, seed=1).abs()}  # all positive: zero points of 0
    linears = {}
    for axis in AXES:
        setting = Setting.parse(f"W{bits}A16g16")
        linears |= quantize_shared({axis: weights[axis]}, random(128, 64), setting, base="rtn", axes=axis)[0]
    assert (linears["ic"].zeros == 0).all()
    assert all({0, 2**bits - 1} <= set(linear.codes.unique().tolist()) for linear in linears.values())
    QuantizedModel(linears=linears).save(tmp_path / "q.safetensors")
    loaded = QuantizedModel.load(tmp_path / "q.safetensors")
    for axis, linear in linears.items():
        assert loaded.linears[axis].axis == axis
        assert torch.equal(loaded.linears[axis].codes, linear.codes)
        assert torch.equal(loaded.linears[axis].weight(), linear.weight())


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
                    linear.weight.data = rounded_along(linear.weight.data, format[axis])
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


# Around it.


def test_unsupported_combinations_say_what_to_do() -> None:
    setting = Setting.parse("W4A16g64")
    assert "W2 to W8" in str(AdaDim().supports(Setting.parse("W16A8")))
    assert "base=gptq" in str(AdaDim(base="rtn", select_with="gptq").supports(setting))
    assert "select_with=rtn" in str(AdaDim(objective="module", select_with="gptq").supports(setting))
    assert AdaDim().supports(setting) is None


def test_a_hessian_that_does_not_factorize_is_reported() -> None:
    indefinite = Hessian(random(64, 64) + random(64, 64).T - 80 * torch.eye(64), 10)
    problem = factorize(indefinite, 0.01, where="layer", allow_rtn_fallback=True)
    solvers, facts = AdaDim(allow_rtn_fallback=True).solvers(indefinite, "layer")
    assert facts["fallback"] and problem.fallback
    weight = random(64, 64)
    assert solvers["gptq"](weight, WeightFormat(3, 16), None).kept_rtn


def test_it_is_listed_with_help_for_every_option() -> None:
    info = describe_methods()["adadim"]
    assert info.broken is None and info.summary.endswith(".")
    assert all(option.help for option in info.options)
