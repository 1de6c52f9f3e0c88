"""Run a whole model through its kernels: every quantized linear replaced by its packed layer.

Which operator each layer ran, in which types, is watched while the model runs and held against what the path declares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import BadOutput, Unsupported
from harness.kernels.cpu import CpuPath, cpu_path
from harness.kernels.pack import PackedLinear, pack
from harness.linear import QuantizedLinear
from harness.transform import InputTransform

_PRODUCTS = (
    "mm", "addmm", "bmm", "linear", "_weight_int4pack_mm_for_cpu", "qlinear_pointwise", "_int_mm", "w4a16_fixed_point",
)  # fmt: skip


class SharedTransform:
    """Transforms the input of linears that share one, once for all of them."""

    def __init__(self, transform: InputTransform, users: int) -> None:
        self.transform, self.users = transform, users
        self._source: torch.Tensor | None = None
        self._result: torch.Tensor | None = None
        self._left = 0

    def __call__(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows in"]:
        if self._result is None or self._source is not x:
            self._source, self._result, self._left = x, self.transform.apply(x), self.users
        result = self._result
        self._left -= 1
        if self._left == 0:
            self._source = self._result = None
        return result


class KernelLinear(nn.Module):
    """Stands in for an ``nn.Linear``: prepares its input, runs the path of its packed layer."""

    def __init__(self, path: CpuPath, transform: SharedTransform | None) -> None:
        super().__init__()
        self.path, self.transform = path, transform

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        if self.transform is not None:
            x = self.transform(x)
        y = self.path(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])


def packed_layers(linears: Mapping[str, QuantizedLinear]) -> dict[str, PackedLinear]:
    """Every layer packed. Raises Unsupported, naming the layer, for what the format does not hold."""
    packed = {}
    for name, linear in linears.items():
        try:
            packed[name] = pack(linear)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.what}", fix=error.fix) from error
    return packed


def kernel_modules(layers: Mapping[str, PackedLinear], device: torch.device) -> dict[str, KernelLinear]:
    """The modules that run ``layers``. Raises Unsupported, naming the layer, where there is no kernel for one."""
    if device.type != "cpu":
        raise Unsupported(f"whole models run through kernels on a CPU only, not on {device.type}", fix="--device cpu")
    users = Counter(id(layer.transform) for layer in layers.values())
    shared = {
        id(layer.transform): SharedTransform(layer.transform, users[id(layer.transform)])
        for layer in layers.values()
        if layer.transform is not None
    }
    modules = {}
    for name, layer in layers.items():
        try:
            modules[name] = KernelLinear(cpu_path(layer), shared.get(id(layer.transform)))
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.what}", fix=error.fix) from error
    return modules


def put_in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set each module under its name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


@dataclass
class Executed:
    """The products that one layer's forward pass was seen to do: (operator, types of its tensor arguments)."""

    products: list[tuple[str, tuple[torch.dtype, ...]]] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    def __init__(self, executed: Executed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.executed = executed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.split("::")[1] in _PRODUCTS:
            dtypes = tuple(value.dtype for value in args if isinstance(value, torch.Tensor) and value.ndim == 2)
            self.executed.products.append((name, dtypes))
        return func(*args, **(kwargs or {}))


def check_precision(modules: Mapping[str, KernelLinear], inputs: Iterable[int]) -> dict[str, int]:
    """Run every layer on rows of ones and see which operator does its product, in which types; counts by operator.

    ``inputs``: numbers of rows to try. Raises BadOutput, naming the layer, where it is not what the path declares.
    """
    counts: Counter[str] = Counter()
    for name, module in modules.items():
        layer = module.path.layer
        for rows in inputs:
            executed, declared = Executed(), module.path.operator(rows)
            with _Watch(executed):
                module.path(torch.ones(rows, layer.in_features))
            expected = (declared.split(" ")[0], _operand_type(declared))
            seen = [(operator, types[0]) for operator, types in executed.products]
            if seen != [expected]:
                raise BadOutput(
                    f"{name} declares {expected[0]} on {expected[1]} and ran {seen}", fix="this is a fault of harness"
                )
            counts[declared] += 1
    return dict(counts)


def _operand_type(operator: str) -> torch.dtype:
    """The type of the activations that an operator is to be given."""
    return {"onednn": torch.uint8, "harness": torch.float32}.get(operator.split("::")[0], torch.bfloat16)
