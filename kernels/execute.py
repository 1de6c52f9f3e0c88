"""Run a whole model through its kernels: every quantized linear replaced by its packed layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from harness.errors import Unsupported
from harness.kernels.cpu import CpuKernels
from harness.kernels.pack import PackedLinear, on_device, pack
from harness.kernels.paths import Kernels, Path, Rows
from harness.linear import QuantizedLinear
from harness.simulation import PreparedInput

_SIMULATION = "--execute simulation"


class KernelInput(PreparedInput):
    """Rows, transformed, as codes where a product is of integers."""

    def __init__(self, make: Callable[[Rows], Any], users: int) -> None:
        super().__init__(users)
        self.make = make

    def prepare(self, x: Float[torch.Tensor, "*rows in"]) -> Any:
        return self.make(x.reshape(-1, x.shape[-1]))


class KernelLinear(nn.Module):
    """Stands in for an ``nn.Linear``: prepares its input, runs the path of its packed layer."""

    def __init__(self, path: Path, prepare: KernelInput) -> None:
        super().__init__()
        self.path, self.prepare = path, prepare

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        y = self.path.multiply(self.prepare(x), x.dtype)
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
    layers: Mapping[str, PackedLinear],
    shared_inputs: Iterable[tuple[str, ...]],
    device: torch.device,
    kernels: Kernels | None = None,
) -> dict[str, KernelLinear]:
    """The modules that run ``layers`` on ``device``, by :func:`kernels_of` it unless ``kernels`` are given; those of a
    group of ``shared_inputs`` that read an input alike share what is prepared of it.

    The layers' tensors are moved there. Raises Unsupported, naming the layer, where there is no kernel for one.
    """
    kernels = kernels or kernels_of(device)
    paths: dict[str, Path] = {}
    for name, layer in on_device(layers, device).items():
        try:
            paths[name] = kernels.path(layer)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.what}", fix=error.fix) from error
    modules: dict[str, KernelLinear] = {}
    for group in shared_inputs:
        alike: dict[Hashable, list[str]] = {}
        for name in group:
            if name in paths:
                alike.setdefault(_read_alike(paths[name]), []).append(name)
        for names in alike.values():
            shared = KernelInput(kernels.preparing(paths[names[0]]), len(names))
            modules |= {name: KernelLinear(paths[name], shared) for name in names}
    if left := paths.keys() - modules.keys():
        raise ValueError(f"no group of shared inputs has {', '.join(sorted(left))}")
    return modules


def _read_alike(path: Path) -> Hashable:
    """The same for paths that make the same of an input: of one kind and one transform, reading alike."""
    return id(path.layer.transform), type(path), path.reads


def put_in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set each module under its name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
