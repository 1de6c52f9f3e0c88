"""Σ x xᵀ beside float64, whatever the activations are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import BadOutput
from harness.hessian import Hessian


@given(
    tokens=st.integers(1, 300),
    inputs=st.integers(1, 80) | st.sampled_from([383, 384, 385, 900]),
    chunk=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_sums_are_float32_for_every_type(tokens: int, inputs: int, chunk: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[:, 0] *= 50  # an outlier channel
    found = Hessian.of(x.split(chunk))
    right = x.double().T @ x.double()
    assert found.matrix.dtype == torch.float32 and found.tokens == tokens
    assert torch.equal(found.matrix, found.matrix.T)
    size = x.double().norm(dim=0)
    error = (found.matrix.double() - right).abs() / (size[:, None] * size).clamp(min=1e-30)
    assert float(error.max()) < 1e-5  # a sum in bfloat16 is off by 1e-3


def test_float32_activations_are_not_cut_to_bfloat16_for_being_mixed_with_others() -> None:
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    alone = Hessian.of([x])
    Hessian.of([x.bfloat16()])
    assert torch.equal(Hessian.of([x]).matrix, alone.matrix)


def test_precision_is_put_back_when_a_product_fails() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        Hessian.of([torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(4, 9, dtype=torch.bfloat16)])
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    x[2, 3] = bad
    with pytest.raises(BadOutput, match="NaN or infinity"):
        Hessian.of([x], where="layer")
