"""AdaDim's choices: the identities behind them, planted outliers that decide them, and naive versions beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.architecture import Block
from harness.errors import HarnessError
from harness.hessian import Hessian
from harness.linear import QuantizedLinear
from harness.method import Report
from harness.methods.adadim import AXES, AdaDim, Choice, ModuleErrors, rounded
from harness.methods.gptq import GPTQ
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
