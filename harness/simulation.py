"""Run a quantized linear in floating point: on exactly the values that its integers stand for, or on the integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec, levels_of_tokens, simulate_tokens
from harness.transform import InputTransform


class PreparedInput(ABC):
    """What linears that share an input are given of it, made once for all of them."""

    def __init__(self, users: int) -> None:
        self.users = users
        self._source: torch.Tensor | None = None
        self._prepared: Any = None
        self._left = 0

    @abstractmethod
    def prepare(self, x: Float[torch.Tensor, "*rows in"]) -> Any:
        """What is made of an input."""

    def __call__(self, x: Float[torch.Tensor, "*rows in"]) -> Any:
        if self._left == 0 or self._source is not x:
            self._source, self._prepared, self._left = x, self.prepare(x), self.users
        prepared = self._prepared
        self._left -= 1
        if self._left == 0:  # nobody else needs it: do not keep activations alive
            self._source = self._prepared = None
        return prepared


class SimulatedInput(PreparedInput):
    """Transformed, quantized and back."""

    def __init__(self, activation: ActivationSpec | None, transform: InputTransform | None, users: int) -> None:
        super().__init__(users)
        self.activation, self.transform = activation, transform

    def prepare(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows in"]:
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

    def __init__(self, quantized: QuantizedLinear, prepare: SimulatedInput | None, dtype: torch.dtype) -> None:
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


class IntegerInput(PreparedInput):
    """Transformed; codes less their zero points, and scales."""

    def __init__(self, activation: ActivationSpec, transform: InputTransform | None, users: int) -> None:
        super().__init__(users)
        self.activation, self.transform = activation, transform

    def prepare(
        self, x: Float[torch.Tensor, "*rows in"]
    ) -> tuple[Float[torch.Tensor, "*rows in"], Float[torch.Tensor, "*rows 1"]]:
        return levels_of_tokens(x if self.transform is None else self.transform.apply(x), self.activation)


class IntegerLinear(nn.Module):
    """Stands in for an ``nn.Linear`` whose weight has a scale for each output: multiplies integers, in float32.

    Up to 2²⁴ their sums are exact, and the same whoever adds them up in whichever order: a score does not depend on the
    processor's products, and an integer kernel has the same bits. 4386 inputs of 4 and 8 bits cannot leave that range
    (258 of 8 and 8 bits); more do where codes lie at the ends of theirs all along, and are rounded as floats are.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, quantized: QuantizedLinear, prepare: IntegerInput) -> None:
        super().__init__()
        self.prepare = prepare
        self.out_features, self.in_features = quantized.codes.shape
        self.register_buffer("weight", quantized.codes - quantized.zeros.float(), persistent=False)
        self.register_buffer("scales", quantized.scales[:, 0].float(), persistent=False)
        bias = None if quantized.bias is None else quantized.bias.float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        levels, scale = self.prepare(x)
        y = nn.functional.linear(levels, self.weight).mul_(self.scales).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)


def simulate(
    linears: Mapping[str, QuantizedLinear], shared_inputs: Iterable[tuple[str, ...]], dtype: torch.dtype
) -> dict[str, SimulatedLinear]:
    """The modules that run ``linears`` while a model is quantized, to the bit as a pass that is trained runs them.

    Those of a group of ``shared_inputs`` with equal preparation share its work.
    """
    modules: dict[str, SimulatedLinear] = {}
    for alike in _prepared_alike(linears, shared_inputs):
        modules |= alike.in_floats(dtype)
    return modules


def scored(
    linears: Mapping[str, QuantizedLinear], shared_inputs: Iterable[tuple[str, ...]], dtype: torch.dtype
) -> dict[str, SimulatedLinear | IntegerLinear]:
    """The modules that run ``linears`` when a model is scored.

    Those of :func:`simulate`, but integers where both sides are and a scale belongs to a whole sum, in a float32 model.
    """
    modules: dict[str, SimulatedLinear | IntegerLinear] = {}
    for alike in _prepared_alike(linears, shared_inputs):
        integers = {name for name, linear in alike.linears.items() if dtype == torch.float32 and _of_integers(linear)}
        modules |= alike.only(integers).in_integers()
        modules |= alike.only(alike.linears.keys() - integers).in_floats(dtype)
    return modules


@dataclass(frozen=True)
class _Alike:
    """Linears that share an input and what is made of it."""

    activation: ActivationSpec | None
    transform: InputTransform | None
    linears: Mapping[str, QuantizedLinear]

    def only(self, names: Set[str]) -> _Alike:
        return replace(self, linears={name: linear for name, linear in self.linears.items() if name in names})

    def in_floats(self, dtype: torch.dtype) -> dict[str, SimulatedLinear]:
        prepare = None
        if self.activation is not None or self.transform is not None:
            prepare = SimulatedInput(self.activation, self.transform, len(self.linears))
        return {name: SimulatedLinear(linear, prepare, dtype) for name, linear in self.linears.items()}

    def in_integers(self) -> dict[str, IntegerLinear]:
        if self.activation is None:
            return {}
        prepare = IntegerInput(self.activation, self.transform, len(self.linears))
        return {name: IntegerLinear(linear, prepare) for name, linear in self.linears.items()}


def _prepared_alike(
    linears: Mapping[str, QuantizedLinear], shared_inputs: Iterable[tuple[str, ...]]
) -> Iterator[_Alike]:
    for group in shared_inputs:
        members = {name: linears[name] for name in group if name in linears}
        alike: dict[Hashable, dict[str, QuantizedLinear]] = {}
        for name, linear in members.items():
            alike.setdefault((linear.activation, id(linear.transform)), {})[name] = linear
        for found in alike.values():
            first = next(iter(found.values()))
            yield _Alike(first.activation, first.transform, found)


def _of_integers(linear: QuantizedLinear) -> bool:
    return linear.activation is not None and linear.axis == "oc" and linear.scales.shape[1] == 1
