"""The shared quantizer: conventions, invariants over shapes and extremes, and a naive float64 version beside it."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.quantizer import (
    SEARCH_NORM,
    ActivationSpec,
    WeightFormat,
    decode,
    encode,
    encode_tokens,
    expand,
    find_grid,
    simulate_tokens,
    token_grid,
)
from harness.settings import Setting

BITS = st.sampled_from([2, 3, 4, 8])
FORMATS = st.builds(
    WeightFormat,
    bits=BITS,
    group_size=st.sampled_from([None, 1, 4, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from(["oc", "ic"]),
    clip_search=st.booleans(),
)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices of every kind that breaks quantizers: constant, of one sign, zero, with outliers, tiny, huge."""
    shape = draw(st.sampled_from([(8, 8), (8, 24), (16, 8), (40, 8)]))
    w = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    match draw(st.sampled_from(["plain", "positive", "negative", "constant", "zero rows", "outlier", "tiny", "huge"])):
        case "positive":
            w = w.abs() + 1
        case "negative":
            w = -w.abs() - 1
        case "constant":
            w = torch.full(shape, float(w[0, 0]))
        case "zero rows":
            w[::2] = 0
        case "outlier":
            w[1, 2] = 1e4
        case "tiny":
            w = w * 1e-9
        case "huge":
            w = w * 1e4
    return w


def rounded(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    grid = find_grid(weight, format)
    return decode(encode(weight, grid), grid)


def naive(weight: np.ndarray, format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values by the book, one group at a time in float64."""
    w = weight if format.axis == "oc" else weight.T
    g = format.group_size or w.shape[1]
    m = 2**format.bits - 1
    codes, values = np.zeros(w.shape), np.zeros(w.shape)
    for r in range(w.shape[0]):
        for c in range(0, w.shape[1], g):
            group = w[r, c : c + g]
            lo, hi = min(group.min(), 0), max(group.max(), 0)
            if lo == hi == 0:
                lo, hi = -1, 1
            if format.symmetric:
                hi = max(-lo, hi)
                lo = -hi
            s = np.float64(np.float16(max(np.float32(hi - lo) / np.float32(m), 2**-24)))
            z = 2 ** (format.bits - 1) if format.symmetric else np.clip(np.round(np.float32(-lo) / np.float32(s)), 0, m)
            q = np.clip(np.round(group.astype(np.float32) / np.float32(s)) + z, 0, m)
            codes[r, c : c + g], values[r, c : c + g] = q, (q - z) * s
    return (codes, values) if format.axis == "oc" else (codes.T, values.T)


@given(weights(), FORMATS)
@settings(deadline=None, max_examples=150)
def test_codes_are_those_of_the_naive_version(weight: torch.Tensor, format: WeightFormat) -> None:
    format = dataclasses.replace(format, clip_search=False)
    grid = find_grid(weight, format)
    codes, values = naive(weight.numpy(), format)
    np.testing.assert_array_equal(encode(weight, grid).numpy(), codes)
    np.testing.assert_allclose(decode(encode(weight, grid), grid).numpy(), values, rtol=1e-6, atol=0)


@pytest.mark.fault(21)
@given(weights(), FORMATS)
@settings(deadline=None, max_examples=150)
def test_grid_is_finite_and_codes_within_bits(weight: torch.Tensor, format: WeightFormat) -> None:
    grid = find_grid(weight, format)
    assert torch.isfinite(grid.scales).all() and (grid.scales > 0).all()
    assert int(encode(weight, grid).max()) < 2**format.bits and int(grid.zeros.max()) < 2**format.bits
    assert torch.isfinite(rounded(weight, format)).all()


@given(weights(), FORMATS)
@settings(deadline=None)
def test_rounding_twice_on_one_grid_changes_nothing(weight: torch.Tensor, format: WeightFormat) -> None:
    grid = find_grid(weight, format)
    once = decode(encode(weight, grid), grid)
    assert torch.equal(decode(encode(once, grid), grid), once)


@given(weights(), FORMATS)
@settings(deadline=None)
def test_error_is_half_a_step_where_nothing_is_clipped(weight: torch.Tensor, format: WeightFormat) -> None:
    grid = find_grid(weight, format)
    codes = encode(weight, grid)
    scales, zeros = expand(grid, weight.shape)
    unclipped = ((weight / scales).round() + zeros == codes.float()).expand(weight.shape)
    error = (weight - decode(codes, grid)).abs()
    assert (error <= scales.expand(weight.shape) * (0.5 + 1e-5))[unclipped].all()


@given(weights(), BITS, st.sampled_from([None, 4, 8]), st.booleans())
@settings(deadline=None)
def test_axis_ic_is_axis_oc_of_the_transpose(w: torch.Tensor, bits: int, group: int | None, search: bool) -> None:
    oc = WeightFormat(bits, group, clip_search=search)
    ic = WeightFormat(bits, group, axis="ic", clip_search=search)
    assert torch.equal(rounded(w, ic), rounded(w.T.contiguous(), oc).T)


def test_outlier_column_stays_alone_on_axis_ic() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scaled = w.clone()
    scaled[:, 7] *= 64
    format = WeightFormat(4, 32, axis="ic")
    expected = rounded(w, format)
    expected[:, 7] *= 64
    assert torch.equal(rounded(scaled, format), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_search_is_never_worse_than_min_max_in_its_own_norm(bits: int, symmetric: bool) -> None:
    w = torch.randn(256, 64, generator=torch.Generator().manual_seed(bits))
    errors = [
        (w - rounded(w, WeightFormat(bits, 64, symmetric, clip_search=search))).abs().pow(SEARCH_NORM).sum(1)
        for search in (False, True)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < errors[0].sum()


def test_search_halves_the_error_of_two_bits() -> None:
    w = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    plain, searched = (
        float((w - rounded(w, WeightFormat(2, 128, clip_search=search))).square().mean()) for search in (False, True)
    )
    assert searched < 0.6 * plain


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize("group", [None, 16])
def test_more_bits_mean_less_error(axis: str, group: int | None) -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    e2, e3, e4, e8 = (float((w - rounded(w, WeightFormat(b, group, axis=axis))).square().mean()) for b in (2, 3, 4, 8))
    assert e2 > 2 * e3 > 4 * e4 > 100 * e8


def test_range_includes_zero_so_that_one_sided_groups_survive() -> None:
    w = torch.linspace(1.0, 1.1, 64)[None]
    assert float((w - rounded(w, WeightFormat(4))).square().mean()) < 2e-3
    assert (rounded(-w, WeightFormat(4)) == -rounded(w, WeightFormat(4))).all()


def test_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(HarnessError, match=r"groups of 100 do not divide 576 inputs[\s\S]*g16, g32, g64"):
        find_grid(torch.zeros(4, 576), WeightFormat(4, 100))


def test_two_bits_search_by_default_and_others_do_not() -> None:
    assert WeightFormat.of(Setting.parse("W2A16g64")).clip_search
    assert not WeightFormat.of(Setting.parse("W4A16g64")).clip_search
    assert WeightFormat.of(Setting.parse("W4A16")).searched(True).clip_search


SPECS = st.builds(ActivationSpec, st.sampled_from([4, 8]), st.booleans(), st.sampled_from([1.0, 0.9]))


@given(weights(), SPECS)
@settings(deadline=None)
def test_simulated_tokens_are_what_their_integers_stand_for(x: torch.Tensor, spec: ActivationSpec) -> None:
    codes, scale, zero = encode_tokens(x, spec)
    assert int(codes.max()) < 2**spec.bits
    torch.testing.assert_close(simulate_tokens(x, spec), (codes.float() - zero) * scale, rtol=0, atol=0)


@given(weights(), SPECS)
@settings(deadline=None)
def test_tokens_do_not_see_each_other(x: torch.Tensor, spec: ActivationSpec) -> None:
    alone = torch.cat([simulate_tokens(row[None], spec) for row in x])
    assert torch.equal(simulate_tokens(x, spec), alone)
    assert torch.equal(simulate_tokens(x[None].expand(3, -1, -1), spec)[1], alone)


@given(weights(), st.builds(ActivationSpec, st.sampled_from([4, 8]), st.booleans()))
@settings(deadline=None)
def test_token_error_is_within_a_step(x: torch.Tensor, spec: ActivationSpec) -> None:
    """Half a step inside the range; rounding the zero point moves its ends by up to another half."""
    scale, _ = token_grid(x, spec)
    assert ((simulate_tokens(x, spec) - x).abs() <= scale * (1 + 1e-5)).all()


def test_zero_token_stays_zero() -> None:
    x = torch.zeros(3, 16)
    for spec in (ActivationSpec(4), ActivationSpec(8, symmetric=True)):
        assert torch.equal(simulate_tokens(x, spec), x)


def test_half_precision_activations_keep_their_dtype() -> None:
    x = torch.randn(4, 32).bfloat16()
    assert simulate_tokens(x, ActivationSpec(8)).dtype == torch.bfloat16
