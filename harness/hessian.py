"""The Hessian of a linear layer's reconstruction error, streamed over the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from harness.errors import BadOutput

_PANEL = 384  # columns worked on at once: only the panels on and above the diagonal are computed


@dataclass(frozen=True)
class Hessian:
    """Σ x xᵀ over ``tokens`` tokens, in float32, not normalised. Raises BadOutput when it is not finite."""

    matrix: Float[torch.Tensor, "in in"]
    tokens: int

    @classmethod
    def of(cls, chunks: Iterable[Float[torch.Tensor, "_tokens _in"]], *, where: str | None = None) -> Hessian:
        """Accumulate in the order of ``chunks``; the products are float32 whatever the activations are."""
        upper, tokens = None, 0
        for chunk in chunks:
            x = chunk.float()
            if upper is None:
                upper = x.new_zeros(x.shape[1], x.shape[1])
            with _units_for(chunk.dtype):
                for start in range(0, x.shape[1], _PANEL):
                    panel = upper[start : start + _PANEL, start:]
                    panel.addmm_(x[:, start : start + _PANEL].T, x[:, start:])
            tokens += x.shape[0]
        if upper is None:
            raise ValueError("no tokens")
        if not torch.isfinite(upper.diagonal()).all():
            raise BadOutput(
                "the calibration activations hold NaN or infinity", where=where, fix="look at the layer before this one"
            )
        return cls(upper.triu() + upper.triu(1).T, tokens)

    def error(self, difference: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, " out"]:
        """Mean squared output error of each row of a weight difference: diag(ΔW H ΔWᵀ) / tokens."""
        return ((difference @ self.matrix) * difference).sum(dim=1) / self.tokens


@contextmanager
def _units_for(dtype: torch.dtype) -> Iterator[None]:
    """Within, float32 products of numbers that were bfloat16 are made where a CPU makes those, if it can.

    Nothing is lost: such a product has 16 bits, and sums are float32 there too.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
