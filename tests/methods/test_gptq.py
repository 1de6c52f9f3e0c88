"""GPTQ's identities and invariants, and a naive float64 version beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gptq_problems import FORMATS, SEEDS, correlated, hessian, random, solve, values
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import BadOutput
from harness.hessian import Hessian
from harness.methods.gptq import GPTQ
from harness.quantizer import Grid, WeightFormat, decode, encode, expand, find_grid
from harness.reconstruction import StaticLevels, factorize, solve_columns


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


def test_a_hessian_that_cannot_be_factorized_in_the_order_of_rounding_is_named() -> None:
    """What the ladder of dampings has accepted in one order can fail in another, by rounding."""
    problem = factorize(hessian(correlated(128, 16)), 0.01, where="layer", allow_rtn_fallback=False)
    singular = replace(problem, hessian=problem.hessian - 2 * torch.diag(problem.hessian.diagonal()))
    with pytest.raises(BadOutput, match="singular"):
        singular.factor(torch.arange(16))
