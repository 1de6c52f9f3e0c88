"""GPTQ's identities and invariants, and a naive float64 version beside it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.driver import quantize_model
from harness.errors import BadOutput
from harness.hessian import Hessian
from harness.methods.gptq import GPTQ, _stacks
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import Grid, WeightFormat, decode, encode, expand, find_grid
from harness.reconstruction import Solution, StaticLevels, drift, factorize, solve_columns
from harness.settings import Setting

FORMATS = st.builds(
    WeightFormat,
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([None, 8, 16]),
    symmetric=st.booleans(),
    axis=st.sampled_from(["oc", "ic"]),
)
SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Activations with structure: AR(0.7) along the channels, some of them much larger."""
    x = random(tokens, features, seed=seed)
    for j in range(1, features):
        x[:, j] = 0.7 * x[:, j - 1] + 0.7 * x[:, j]
    return x * (1 + 10 * (torch.arange(features) % 17 == 3))


def hessian(x: torch.Tensor) -> Hessian:
    return Hessian.of(x.split(64))


def solve(method: GPTQ, weight: torch.Tensor, h: Hessian, format: WeightFormat) -> Solution:
    problem = factorize(h, method.damp, where="layer", allow_rtn_fallback=method.allow_rtn_fallback)
    return method.solve(weight, weight, problem, format)


def values(solution: Solution) -> torch.Tensor:
    return decode(solution.codes, solution.grid)


def naive_gptq(
    weight: torch.Tensor, h: torch.Tensor, damp: float, grid: Grid, order: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """By the book in float64: explicit inverse, upper Cholesky factor, one column after another, no blocks."""
    w, hh = weight.double().numpy().copy(), h.double().numpy().copy()
    dead = np.diag(hh) == 0
    hh[dead, dead] = 1
    w[:, dead] = 0
    hh += damp * np.mean(np.diag(hh)) * np.eye(len(hh))
    p = order.numpy()
    u = np.linalg.cholesky(np.linalg.inv(hh[np.ix_(p, p)])).T
    scales, zeros = (t.double().expand(weight.shape).numpy() for t in expand(grid, weight.shape))
    m = 2**grid.format.bits - 1
    w, codes, errors = w[:, p], np.zeros(w.shape), np.zeros(w.shape)
    for j in range(w.shape[1]):
        s, z = scales[:, p[j]], zeros[:, p[j]]
        codes[:, j] = np.clip(np.round(w[:, j] / s) + z, 0, m)
        errors[:, j] = (w[:, j] - (codes[:, j] - z) * s) / u[j, j]
        w[:, j + 1 :] -= np.outer(errors[:, j], u[j, j + 1 :])
    back = np.argsort(p)
    return codes[:, back], errors


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_the_naive_float64_version(bits: int, symmetric: bool, act_order: bool) -> None:
    weight, x = random(48, 192, seed=bits), correlated(512, 192)
    x[:, 5] = 0
    format = WeightFormat(bits, 64, symmetric)
    h = hessian(x)
    method = GPTQ(act_order=act_order)
    solution = solve(method, weight, h, format)
    alive = weight.clone()
    alive[:, 5] = 0
    grid = find_grid(alive, format)
    order = h.matrix.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(192)
    codes, errors = naive_gptq(weight, x.double().T @ x.double(), 0.01, grid, order)
    assert (solution.codes.numpy() == codes).mean() > 0.999  # a tie in float32 may fall the other way in float64
    assert float(solution.error.sum()) == pytest.approx(float((errors**2).sum()) / 512, rel=1e-3)


@given(SEEDS, FORMATS, st.booleans())
@settings(deadline=None, max_examples=40)
def test_diagonal_hessian_is_rounding_to_nearest(seed: int, format: WeightFormat, act_order: bool) -> None:
    weight = random(16, 32, seed=seed)
    diagonal = random(32, seed=seed + 1).square() + 0.1
    solution = solve(GPTQ(act_order=act_order), weight, Hessian(torch.diag(diagonal), 100), format)
    grid = find_grid(weight, format)
    assert torch.equal(solution.codes, encode(weight, grid))
    assert torch.equal(solution.grid.scales, grid.scales) and torch.equal(solution.grid.zeros, grid.zeros)


@given(SEEDS, FORMATS, st.sampled_from([2.0**-8, 0.25, 4.0, 1024.0]))
@settings(deadline=None, max_examples=30)
def test_scale_of_the_hessian_does_not_matter(seed: int, format: WeightFormat, factor: float) -> None:
    weight, h = random(16, 32, seed=seed), hessian(correlated(128, 32, seed=seed))
    scaled = Hessian(h.matrix * factor, h.tokens)
    assert torch.equal(solve(GPTQ(), weight, h, format).codes, solve(GPTQ(), weight, scaled, format).codes)


@given(SEEDS, FORMATS, st.sampled_from([1, 8, 24, 64, 500]))
@settings(deadline=None, max_examples=30)
def test_block_size_does_not_matter(seed: int, format: WeightFormat, block_size: int) -> None:
    weight, h = random(16, 96, seed=seed), hessian(correlated(256, 96, seed=seed))
    one, other = (solve(GPTQ(block_size=b), weight, h, format) for b in (128, block_size))
    # Sums in another order may break a tie; on axis ic also one of a scale's rounding, and so a whole column's.
    assert (one.codes != other.codes).float().mean() < (2e-3 if format.axis == "oc" else 5e-2)
    assert float(one.error.sum()) == pytest.approx(float(other.error.sum()), rel=5e-2)


@given(SEEDS, FORMATS)
@settings(deadline=None, max_examples=30)
def test_rows_do_not_depend_on_each_other(seed: int, format: WeightFormat) -> None:
    weight, h = random(32, 48, seed=seed), hessian(correlated(128, 48, seed=seed))
    if format.axis == "ic" and format.group_size is None:
        format = replace(format, group_size=16)
    whole = solve(GPTQ(), weight, h, format)
    halves = [solve(GPTQ(), part, h, format) for part in weight.split(16)]
    for one, other in zip(whole.split([16, 16]), halves, strict=True):
        assert (one.codes != other.codes).float().mean() < 2e-3
        torch.testing.assert_close(one.grid.scales, other.grid.scales, rtol=1e-2, atol=1e-3)


@given(SEEDS, st.sampled_from(["oc", "ic"]))
@settings(deadline=None, max_examples=20)
def test_solving_permuted_columns_is_solving_in_that_order(seed: int, axis: str) -> None:
    weight, x = random(16, 32, seed=seed), correlated(128, 32, seed=seed)
    order = x.square().sum(0).argsort(descending=True, stable=True)
    # One group per row, or groups within a column: the grid does not depend on the order of columns.
    format = WeightFormat(3, None if axis == "oc" else 8, axis=axis)  # type: ignore[arg-type]
    ordered = solve(GPTQ(act_order=True), weight, hessian(x), format)
    permuted = solve(GPTQ(act_order=False), weight[:, order], hessian(x[:, order]), format)
    assert (ordered.codes[:, order] != permuted.codes).float().mean() < 5e-3
    assert torch.isclose(values(ordered)[:, order], values(permuted), atol=1e-3).float().mean() > 0.99


@given(SEEDS, FORMATS, st.booleans())
@settings(deadline=None, max_examples=20)
def test_dead_columns_become_exactly_zero(seed: int, format: WeightFormat, act_order: bool) -> None:
    x = correlated(128, 32, seed=seed)
    x[:, ::5] = 0
    solution = solve(GPTQ(act_order=act_order), random(16, 32, seed=seed), hessian(x), format)
    assert (values(solution)[:, ::5] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"static_groups": False, "act_order": False}, {"group_aware": True}, {"axis": "ic"}]
)
def test_error_is_the_damped_quadratic_form_and_beats_rounding(options: dict[str, object]) -> None:
    weight, x = random(64, 128), correlated(1024, 128)
    method = GPTQ(**options)  # type: ignore[arg-type]
    h = hessian(x)
    solution = solve(method, weight, h, WeightFormat(3, 32, axis=method.axis))
    difference = (weight - values(solution)).double()
    damped = h.matrix.double() + 0.01 * h.matrix.diagonal().double().mean() * torch.eye(128, dtype=torch.float64)
    expected = (difference @ damped * difference).sum() / 1024
    assert float(solution.error.double().sum()) == pytest.approx(float(expected), rel=1e-4)
    assert float(solution.error.sum()) < 0.7 * float(solution.rtn_error.sum())


def test_error_is_below_babais_bound_where_nothing_is_clipped() -> None:
    weight, x = random(32, 64), correlated(512, 64)
    format = WeightFormat(4)
    h = hessian(x)
    # A grid so wide that updated weights stay inside.
    wide = find_grid(weight * 3, format)
    problem = factorize(h, 0.01, where="layer", allow_rtn_fallback=False)
    order = torch.arange(64)
    codes = solve_columns(weight, problem.factor(order), order, StaticLevels(weight, wide, order), 128)
    assert int(codes.min()) > 0 and int(codes.max()) < 15
    diagonal = torch.linalg.cholesky(torch.linalg.inv(problem.hessian), upper=True).diagonal()
    bound = ((wide.scales.float() / 2).square() / diagonal.square()).sum() / 512
    assert float(problem.error(weight - decode(codes, wide)).sum()) <= float(bound)


def test_more_correlated_inputs_gain_more() -> None:
    weight, format = random(64, 96), WeightFormat(3, 32)
    low_rank = random(512, 6) @ random(6, 96, seed=1) + 0.01 * random(512, 96, seed=2)
    ratios = []
    for x in (random(512, 96), correlated(512, 96), low_rank):
        solution = solve(GPTQ(), weight, hessian(x), format)
        ratios.append(float(solution.error.sum() / solution.rtn_error.sum()))
    assert 1.0 > ratios[0] > ratios[1] > ratios[2]


def test_damping_climbs_until_the_hessian_factorizes_and_says_so() -> None:
    singular = hessian(random(4, 64))  # rank 4
    plain = factorize(singular, 1e-9, where="layer", allow_rtn_fallback=False)
    assert plain.damp > 1e-9 and not plain.fallback
    indefinite = Hessian(random(16, 16) + random(16, 16).T - 40 * torch.eye(16), 10)
    with pytest.raises(BadOutput, match=r"model\.layer: the Hessian is not positive definite[\s\S]*allow_rtn_fallback"):
        factorize(indefinite, 0.01, where="model.layer", allow_rtn_fallback=False)
    fallen = factorize(indefinite, 0.01, where="layer", allow_rtn_fallback=True)
    assert fallen.fallback
    weight, format = random(8, 16), WeightFormat(4)
    solution = GPTQ(allow_rtn_fallback=True).solve(weight, weight, fallen, format)
    assert solution.kept_rtn and torch.equal(solution.codes, encode(weight, find_grid(weight, format)))


def test_nan_in_the_activations_is_refused() -> None:
    x = random(64, 16)
    x[3, 4] = torch.nan
    with pytest.raises(BadOutput, match="NaN"):
        hessian(x)


def test_best_of_rtn_is_never_worse_than_either() -> None:
    for seed in range(20):
        weight, h = random(1, 32, seed=seed), hessian(random(64, 32, seed=seed + 100))
        best = solve(GPTQ(best_of_rtn=True), weight, h, WeightFormat(3, 16))
        plain = solve(GPTQ(), weight, h, WeightFormat(3, 16))
        assert float(best.error.sum()) == min(float(plain.error.sum()), float(plain.rtn_error.sum()))


def test_drift_correction_brings_the_output_closer_to_the_full_precision_one() -> None:
    weight, x_fp = random(32, 48), correlated(512, 48)
    x = x_fp + 0.3 * random(512, 48, seed=5) * x_fp.std(0)
    problem = factorize(hessian(x), 0.001, where="layer", allow_rtn_fallback=False)
    change = drift(weight, x.split(100), x_fp.split(100), problem)
    before = (x_fp @ weight.T - x @ weight.T).square().mean()
    after = (x_fp @ weight.T - x @ (weight + change).T).square().mean()
    best = torch.linalg.lstsq(x, x_fp @ weight.T).solution.T
    limit = (x_fp @ weight.T - x @ best.T).square().mean()
    assert limit <= after < 1.02 * limit < before


def test_with_its_drift_made_up_for_every_column_is_rounded_where_the_best_of_the_rest_would_put_it() -> None:
    """Qronos in float64, without a factorization: after each code the least squares of all columns that are left."""
    weight, x_fp = random(16, 24), correlated(256, 24)
    x = x_fp + 0.3 * random(256, 24, seed=5) * x_fp.std(0)
    problem = factorize(hessian(x), 0.01, where="layer", allow_rtn_fallback=False)
    method, format = GPTQ(act_order=False), WeightFormat(3, 8)
    target = weight + drift(weight, x.split(100), x_fp.split(100), problem)
    found = method.solve(weight, target, problem, format)
    scales, zeros = (t.double().expand(weight.shape) for t in expand(found.grid, weight.shape))
    w, xx = weight.double(), x.double()
    damp = 0.01 * (xx.T @ xx).diagonal().mean()
    wanted = x_fp.double() @ w.T  # and no column far from where it was
    codes, left = torch.zeros_like(w), w
    for j in range(24):
        rest = xx[:, j:]
        given = wanted - xx[:, :j] @ ((codes - zeros) * scales)[:, :j].T
        left = torch.linalg.solve(rest.T @ rest + damp * torch.eye(24 - j), rest.T @ given + damp * w[:, j:].T).T
        codes[:, j] = ((left[:, 0] / scales[:, j]).round() + zeros[:, j]).clamp(0, 7)
    assert (found.codes == codes).double().mean() > 0.999


def test_a_hessian_that_cannot_be_factorized_in_the_order_of_rounding_is_named() -> None:
    """What the ladder of dampings has accepted in one order can fail in another, by rounding."""
    problem = factorize(hessian(correlated(128, 16)), 0.01, where="layer", allow_rtn_fallback=False)
    singular = replace(problem, hessian=problem.hessian - 2 * torch.diag(problem.hessian.diagonal()))
    with pytest.raises(BadOutput, match="singular"):
        singular.factor(torch.arange(16))


def test_each_linear_is_judged_against_its_own_rounding(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Linears that share an input are solved together, unless what is kept is decided for each."""
    weights = {"q": random(64, 32), "k": random(1, 32)}
    assert _stacks(weights, WeightFormat(4, 16), apart=True) == [("q",), ("k",)]
    assert _stacks(weights, WeightFormat(4, 16), apart=False) == [("q", "k")]
    kept = quantize(tiny_model, tmp_path, "W4A16g16", best_of_rtn=True)
    by_layer = {row["layer"]: row for row in kept.report}
    for row in by_layer.values():
        assert row["error_ratio"] <= 1, row


def fresh_by_hand(weight: torch.Tensor, h: torch.Tensor, damp: float, bits: int, size: int) -> np.ndarray:
    """A grid from the weight as it is when its group is reached; one column after another in float64."""
    w, hh = weight.double().numpy().copy(), h.double().numpy()
    hh = hh + damp * np.mean(np.diag(hh)) * np.eye(len(hh))
    u = np.linalg.cholesky(np.linalg.inv(hh)).T
    codes, m = np.zeros(w.shape), 2**bits - 1
    for j in range(w.shape[1]):
        if j % size == 0:
            grid = find_grid(torch.from_numpy(w[:, j : j + size]).float(), WeightFormat(bits))
            s, z = (t.double().numpy()[:, 0] for t in (grid.scales, grid.zeros))
        codes[:, j] = np.clip(np.round(w[:, j] / s) + z, 0, m)
        error = (w[:, j] - (codes[:, j] - z) * s) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
    return codes


@pytest.mark.parametrize("block_size", [7, 32, 50, 128])
@pytest.mark.parametrize("size", [8, 24, 32, 96])
def test_fresh_grids_are_those_of_the_updated_weight(size: int, block_size: int) -> None:
    weight, x = random(24, 96, seed=size), correlated(512, 96)
    method = GPTQ(static_groups=False, act_order=False, block_size=block_size)
    solution = solve(method, weight, hessian(x), WeightFormat(4, size))
    codes = fresh_by_hand(weight, x.double().T @ x.double(), 0.01, 4, size)
    assert (solution.codes.numpy() == codes).mean() > 0.98
    stale = solve(GPTQ(act_order=False), weight, hessian(x), WeightFormat(4, size))
    if size < 96:  # the grids of the original weight are others
        assert (stale.codes.numpy() == codes).mean() < 0.98


def foem_by_hand(weight: torch.Tensor, h: torch.Tensor, damp: float, grid: Grid, beta: float) -> np.ndarray:
    """Each column gives up β of its drift; the rest moves by the Lagrangian of slope and curvature, in float64.

    The inverse of what is left of the Hessian is made anew for every column; nothing is factorized.
    """
    w, hh = weight.double().numpy().copy(), h.double().numpy()
    original, hh = w.copy(), hh + damp * np.mean(np.diag(hh)) * np.eye(len(hh))
    scales, zeros = (t.double().expand(weight.shape).numpy() for t in expand(grid, weight.shape))
    codes = np.zeros(w.shape)
    for j in range(w.shape[1]):
        w[:, j] -= beta * (w[:, j] - original[:, j])
        codes[:, j] = np.clip(np.round(w[:, j] / scales[:, j]) + zeros[:, j], 0, 2**grid.format.bits - 1)
        inverse = np.linalg.inv(hh[j:, j:])
        rounded = (codes[:, j] - zeros[:, j]) * scales[:, j]
        multiplier = (w[:, j] - rounded - beta * (w[:, j] - original[:, j])) / inverse[0, 0]
        w[:, j + 1 :] -= np.outer(multiplier, inverse[0, 1:])
    return codes


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("block_size", [7, 128])
def test_foem_moves_the_rest_by_slope_and_curvature(beta: float, block_size: int) -> None:
    weight, x = random(32, 96), correlated(512, 96)
    format = WeightFormat(3, 16)
    found = solve(GPTQ(act_order=False, foem_beta=beta, block_size=block_size), weight, hessian(x), format)
    codes = foem_by_hand(weight, x.double().T @ x.double(), 0.01, find_grid(weight, format), beta)
    plain = solve(GPTQ(act_order=False), weight, hessian(x), format)
    assert (found.codes.numpy() == codes).mean() > 0.999 > 0.98 > (plain.codes.numpy() == codes).mean()


@given(SEEDS, FORMATS)
@settings(deadline=None, max_examples=20)
def test_a_column_that_gives_up_all_its_drift_is_rounded_as_it_was(seed: int, format: WeightFormat) -> None:
    """β = 1: rounding to nearest, bit for bit."""
    weight, h = random(16, 32, seed=seed), hessian(correlated(128, 32, seed=seed))
    solution = solve(GPTQ(foem_beta=1.0), weight, h, format)
    assert torch.equal(solution.codes, encode(weight, find_grid(weight, format)))


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
