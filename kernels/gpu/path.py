"""Packed layers on a GPU: which kernel in which configuration, and its run. The interpreter runs it on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float

from harness.kernels.configs import GEMV_ROWS, Config, Kernel, choose
from harness.kernels.gpu import launch
from harness.kernels.pack import TILE_IN, PackedLinear
from harness.quantizer import simulate_tokens
from harness.transform import InputTransform

_FUSED_INPUTS = 4096  # padded inputs up to which a row goes through DuQuant's transform in one kernel


@dataclass(frozen=True)
class Hardware:
    """What a configuration is chosen by. ``gpu``: the model's name, None where nothing is tuned."""

    target: str
    processors: int
    gpu: str | None = None

    @classmethod
    def here(cls) -> Hardware:
        """The first GPU."""
        found = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability(0)
        target = f"sm_{major}{minor}" if torch.version.hip is None else found.gcnArchName.split(":")[0]
        return cls(target, found.multi_processor_count, found.name)


@dataclass(frozen=True)
class GpuPath:
    """A layer, ready to run."""

    layer: PackedLinear
    hardware: Hardware

    def config(self, rows: int) -> tuple[Kernel, Config]:
        """The kernel for so many rows, and its configuration."""
        layer, hardware = self.layer, self.hardware
        kernel: Kernel
        if layer.integers:
            kernel = "wna8" if layer.whole_channels else "wna8_grouped"
        elif rows <= GEMV_ROWS:
            kernel = "wna16_gemv"
        elif layer.whole_channels:
            kernel = "wna16"
        elif layer.axis == "ic":
            kernel = "wna16_ic"
        else:
            kernel = "wna16_narrow" if layer.group_size < TILE_IN else "wna16"
        return kernel, choose(
            kernel, hardware.target, rows, layer.out_features, layer.in_features, hardware.processors, hardware.gpu
        )

    def operator(self, rows: int) -> str:
        kernel, config = self.config(rows)
        split = f", inputs in {config.split_k}" if config.split_k > 1 else ""
        return f"{'act_quant + ' if self.layer.integers else ''}{kernel} {config.block_m}×{config.block_n}{split}"

    def __call__(self, x: Float[torch.Tensor, "rows in"]) -> Float[torch.Tensor, "rows out"]:
        """``x``: float16 or bfloat16, transformed already; the product has its type."""
        _, config = self.config(len(x))
        layer, activation = self.layer, self.layer.activation
        if activation is None:
            return launch.weight_only(x, layer, config)
        if not layer.integers:
            return launch.weight_only(simulate_tokens(x, activation), layer, config)
        return launch.integer(launch.quantize_rows(x, activation, layer), layer, config, x.dtype)


def transformed(
    x: Float[torch.Tensor, "rows in"], transform: InputTransform, layer: PackedLinear
) -> Float[torch.Tensor, "rows in"]:
    """``x`` after an online transform, by the kernels: one for short rows, two for long ones."""
    y = launch.rotate_quantize(x, transform, None, layer, fused=layer.padded_in <= _FUSED_INPUTS)
    assert isinstance(y, torch.Tensor)
    return y
