"""Run a whole model through its kernels: every quantized linear replaced by its packed layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import nn

from harness.errors import Unsupported
from harness.kernels.cpu import CpuKernels
from harness.kernels.pack import PackedLinear, on_device, pack
from harness.kernels.paths import Kernels, Path, Rows
from harness.linear import QuantizedLinear

_SIMULATION = "--execute simulation"


class SharedTransform:
    """Transforms the input of linears that share one, once for all of them."""

    def __init__(self, transform: Callable[[Rows], Rows], users: int) -> None:
        self.transform, self.users = transform, users
        self._source: torch.Tensor | None = None
        self._result: torch.Tensor | None = None
        self._left = 0

    def __call__(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows in"]:
        if self._result is None or self._source is not x:
            y = self.transform(x.reshape(-1, x.shape[-1]))
            self._source, self._result, self._left = x, y.reshape(x.shape), self.users
        result = self._result
        self._left -= 1
        if self._left == 0:
            self._source = self._result = None
        return result


class KernelLinear(nn.Module):
    """Stands in for an ``nn.Linear``: prepares its input, runs the path of its packed layer."""

    def __init__(self, path: Path, transform: SharedTransform | None) -> None:
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


def kernels_of(device: torch.device) -> Kernels:
    """What runs packed layers on ``device``: the one place where this is decided.

    Raises Unsupported for a device, or a GPU of a kind, that there are no kernels for.
    """
    if device.type == "cpu":
        return CpuKernels()
    if device.type != "cuda":
        raise Unsupported(f"there are kernels for a CPU and for CUDA devices, none for {device.type}", fix=_SIMULATION)
    try:
        from harness.kernels.gpu.path import GpuKernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise Unsupported("Triton, which runs kernels on a GPU, is not installed", fix=_SIMULATION) from error
    return GpuKernels.of(device)


def kernel_modules(
    layers: Mapping[str, PackedLinear], device: torch.device, kernels: Kernels | None = None
) -> dict[str, KernelLinear]:
    """The modules that run ``layers`` on ``device``, by :func:`kernels_of` it unless ``kernels`` are given.

    The layers' tensors are moved there. Raises Unsupported, naming the layer, where there is no kernel for one.
    """
    kernels = kernels or kernels_of(device)
    there = on_device(layers, device)
    users = Counter(id(layer.transform) for layer in there.values())
    shared: dict[int, SharedTransform] = {}
    modules = {}
    for name, layer in there.items():
        try:
            path = kernels.path(layer)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.what}", fix=error.fix) from error
        key = id(layer.transform)
        if layer.transform is not None and key not in shared:
            shared[key] = SharedTransform(partial(kernels.transform, layer=layer), users[key])
        modules[name] = KernelLinear(path, shared.get(key))
    return modules


def put_in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set each module under its name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
