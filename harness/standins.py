"""Put something else in a model's place for a while: quantized linears, norms, attention, a forward of another kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from harness.architecture import Block
from harness.attention import AttentionSpec, set_spec
from harness.linear import QuantizedLinear

Modules = Mapping[str, nn.Module]
StandIns = Callable[[Mapping[str, QuantizedLinear], Iterable[tuple[str, ...]], torch.dtype], Modules]


class Part(Protocol):
    """Some quantized layers of a model."""

    @property
    def linears(self) -> Mapping[str, QuantizedLinear]:
        """By full module name."""

    @property
    def norms(self) -> Mapping[str, torch.Tensor]:
        """By full parameter name."""

    @property
    def attention(self) -> Mapping[str, AttentionSpec]:
        """By full module name."""


@contextmanager
def standing_in(
    modules: Modules, part: Part, blocks: Iterable[Block], dtype: torch.dtype, linears: StandIns
) -> Iterator[None]:
    """Within, the linears, norms and attention of ``part``, which lies in ``blocks``, stand in for the model's own;
    ``linears`` makes the modules that run the former."""
    shared = [group for block in blocks for group in block.shared_inputs]
    with ExitStack() as stack:
        stack.enter_context(replaced(modules, linears(part.linears, shared, dtype)))
        for name, value in part.norms.items():
            stack.enter_context(_revalued(modules, name, value))
        for name, spec in part.attention.items():
            stack.callback(set_spec, modules[name], set_spec(modules[name], spec))
        yield


@contextmanager
def replaced(modules: Modules, by: Modules) -> Iterator[None]:
    """Within, the modules ``by`` stand in for those of ``modules`` of the same names."""
    with ExitStack() as stack:
        for name, module in by.items():
            parent_name, _, child = name.rpartition(".")
            parent = modules[parent_name]
            stack.callback(setattr, parent, child, getattr(parent, child))
            setattr(parent, child, module)
        yield


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, ``module`` is computed by ``forward``; its parameters stay in sight."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _revalued(modules: Modules, name: str, value: torch.Tensor) -> Iterator[None]:
    owner, _, child = name.rpartition(".")
    parameter = getattr(modules[owner], child)
    original = parameter.data
    parameter.data = value.to(original)
    try:
        yield
    finally:
        parameter.data = original
