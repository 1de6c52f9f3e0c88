"""What our C does before and behind an integer product, beside the quantizer's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.kernels import native, tokens
from harness.quantizer import ActivationSpec, encode_tokens

KINDS = ("normal", "zeros", "outlier", "positive", "negative", "huge", "tiny", "ties")


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    if reason := native.unavailable():
        pytest.skip(reason)


def activations(kind: str, count: int, inputs: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        x[:, inputs // 2] *= 1e4
    if kind == "ties":
        x = (x * 4).round() / 2
    x = x.abs() if kind == "positive" else -x.abs() if kind == "negative" else x
    return (x * {"zeros": 0.0, "huge": 1e30, "tiny": 1e-30}.get(kind, 1.0)).to(dtype)


@given(
    count=st.integers(1, 20),
    inputs=st.integers(1, 100),
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_quantizers(count, inputs, kind, bits, symmetric, clip, dtype, seed) -> None:
    x, spec = activations(kind, count, inputs, dtype, seed), ActivationSpec(bits, symmetric, clip)
    codes, scales, zeros = tokens.encode(x, spec)
    right, scale, zero = encode_tokens(x, spec)
    assert torch.equal(scales, scale[:, 0]) and torch.equal(zeros, zero[:, 0])
    assert torch.equal(codes, right)


def test_tokens_that_do_not_lie_one_after_another() -> None:
    x, spec = torch.randn(6, 80)[::2, ::2], ActivationSpec(8)
    assert torch.equal(tokens.encode(x, spec)[0], encode_tokens(x, spec)[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_tokens(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(tokens, "_VALUES_OF_A_PART", 16)
    x, spec = activations("normal", 7, 33, torch.float32, 0), ActivationSpec(8)
    codes, scales, zeros = tokens.encode(x, spec)
    assert torch.equal(codes, encode_tokens(x, spec)[0])
    y, sums = torch.randn(7, 50), torch.randn(50)
    right = (y - zeros[:, None] * sums) * scales[:, None]
    torch.testing.assert_close(tokens.finish(y.clone(), sums, None, scales, zeros), right, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 7, 15, 16, 32])
def test_what_is_not_finite_stays_within_its_token(bad: float, at: int) -> None:
    x = torch.randn(3, 33)
    x[1, at] = bad
    codes, scales, zeros = tokens.encode(x, ActivationSpec(8))
    y = tokens.finish(torch.ones(3, 5), torch.ones(5), None, scales, zeros)
    assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()
    assert torch.equal(codes[[0, 2]], encode_tokens(x[[0, 2]], ActivationSpec(8))[0])


@pytest.mark.parametrize("with_bias", [False, True])
def test_finishing_is_the_correction(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y, sums, scales = (torch.randn(*shape, generator=generator) for shape in ((9, 70), (70,), (9,)))
    zeros = torch.randint(0, 256, (9,), generator=generator).float()
    bias = torch.randn(70, generator=generator) if with_bias else None
    right = (y.double() - zeros.double()[:, None] * sums.double()) * scales.double()[:, None]
    right = right if bias is None else right + bias.double()
    found = tokens.finish(y.clone(), sums, bias, scales, zeros)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-3)


def test_without_a_compiler_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, spec, y, sums = torch.randn(5, 40), ActivationSpec(8), torch.randn(5, 30), torch.randn(30)
    bias = torch.randn(30)
    codes, scales, zeros = tokens.encode(x, spec)
    finished = tokens.finish(y.clone(), sums, bias, scales, zeros)
    monkeypatch.setattr(native, "unavailable", lambda: "not wanted here")
    again = tokens.encode(x, spec)
    assert all(torch.equal(one, other) for one, other in zip((codes, scales, zeros), again, strict=True))
    torch.testing.assert_close(tokens.finish(y.clone(), sums, bias, scales, zeros), finished, rtol=1e-5, atol=1e-4)
