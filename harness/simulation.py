"""Run a quantized linear in floating point, on exactly the values that its integers stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import nn

from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec, simulate_tokens
from harness.transform import InputTransform


class PreparedInput:
    """Transforms and quantizes the input of linears that share one, once for all of them."""

    def __init__(self, activation: ActivationSpec | None, transform: InputTransform | None, users: int) -> None:
        self.activation, self.transform, self.users = activation, transform, users
        self._source: torch.Tensor | None = None
        self._prepared: torch.Tensor | None = None
        self._left = 0

    def __call__(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows in"]:
        if self._prepared is None or self._source is not x:
            self._source, self._prepared, self._left = x, self._prepare(x), self.users
        prepared = self._prepared
        self._left -= 1
        if self._left == 0:  # nobody else needs it: do not keep activations alive
            self._source = self._prepared = None
        return prepared

    def _prepare(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows in"]:
        if self.transform is not None:
            x = self.transform.apply(x)
        return x if self.activation is None else self.quantize(x, self.activation)

    def quantize(
        self, x: Float[torch.Tensor, "*rows in"], activation: ActivationSpec
    ) -> Float[torch.Tensor, "*rows in"]:
        return simulate_tokens(x, activation)


class SimulatedLinear(nn.Module):
    """Stands in for an ``nn.Linear``: prepares its input, multiplies by the dequantized weight."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, quantized: QuantizedLinear, prepare: PreparedInput | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.prepare = prepare
        self.out_features, self.in_features = quantized.codes.shape
        self.register_buffer("weight", quantized.weight().to(dtype), persistent=False)
        bias = None if quantized.bias is None else quantized.bias.to(dtype)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        if self.prepare is not None:
            x = self.prepare(x)
        return nn.functional.linear(x, self.weight, self.bias)


def simulate(
    linears: Mapping[str, QuantizedLinear], shared_inputs: Iterable[tuple[str, ...]], dtype: torch.dtype
) -> dict[str, SimulatedLinear]:
    """The modules that run ``linears``; those of a group of ``shared_inputs`` with equal preparation share its work."""
    modules: dict[str, SimulatedLinear] = {}
    for group in shared_inputs:
        members = [name for name in group if name in linears]
        for name in members:
            if name in modules:
                continue
            first = linears[name]
            alike = [other for other in members if _prepared_alike(first, linears[other])]
            prepare = None
            if first.activation is not None or first.transform is not None:
                prepare = PreparedInput(first.activation, first.transform, len(alike))
            modules |= {other: SimulatedLinear(linears[other], prepare, dtype) for other in alike}
    return modules


def _prepared_alike(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    return one.activation == other.activation and one.transform is other.transform
