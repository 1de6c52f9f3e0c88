"""Run a whole model through its kernels: every quantized linear replaced by its packed layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from harness.errors import Unsupported
from harness.kernels.cpu import CpuKernels
from harness.kernels.pack import PackedLinear, on_device, pack
from harness.kernels.paths import Kernels, Path, Rows
from harness.linear import QuantizedLinear

_SIMULATION = "--execute simulation"


class SharedInput:
    """Prepares the input of linears that share one, once for all of them: transforms it, and has its codes made."""

    def __init__(self, prepare: Callable[[Rows], Any], users: int) -> None:
        self.prepare, self.users = prepare, users
        self._source: torch.Tensor | None = None
        self._given: Any = None
        self._left = 0

    def __call__(self, x: Float[torch.Tensor, "*rows in"]) -> Any:
        if self._left == 0 or self._source is not x:
            self._given = self.prepare(x.reshape(-1, x.shape[-1]))
            self._source, self._left = x, self.users
        given = self._given
        self._left -= 1
        if self._left == 0:
            self._source = self._given = None
        return given


class KernelLinear(nn.Module):
    """Stands in for an ``nn.Linear``: prepares its input, runs the path of its packed layer."""

    def __init__(self, path: Path, shared: SharedInput) -> None:
        super().__init__()
        self.path, self.shared = path, shared

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        y = self.path.multiply(self.shared(x), x.dtype)
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
    paths: dict[str, Path] = {}
    for name, layer in on_device(layers, device).items():
        try:
            paths[name] = kernels.path(layer)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.what}", fix=error.fix) from error
    inputs = {name: _input_of(name, path) for name, path in paths.items()}
    users = Counter(inputs.values())
    shared = {key: SharedInput(kernels.preparing(paths[name]), users[key]) for name, key in inputs.items()}
    return {name: KernelLinear(path, shared[inputs[name]]) for name, path in paths.items()}


def _input_of(name: str, path: Path) -> Hashable:
    """Alike for paths that share what is prepared of an input: of one kind and one online transform, reading alike."""
    transform = path.layer.transform
    return name if transform is None else (id(transform), type(path), path.reads)


def put_in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set each module under its name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
