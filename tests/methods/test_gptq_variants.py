"""Options of GPTQ beside versions by hand: drift made up for (Qronos) or given up (FOEM), grids made on the way."""

import numpy as np
import pytest
import torch
from gptq_problems import FORMATS, SEEDS, correlated, hessian, random, solve
from hypothesis import given, settings

from harness.methods.gptq import GPTQ
from harness.quantizer import Grid, WeightFormat, encode, expand, find_grid
from harness.reconstruction import drift, factorize


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
