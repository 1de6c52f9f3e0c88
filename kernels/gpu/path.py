"""Packed layers on a GPU: which kernel in which configuration, and its run. The interpreter runs it on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from harness.errors import Unsupported
from harness.kernels.configs import GEMV_ROWS, Config, Kernel, choose
from harness.kernels.gpu import launch
from harness.kernels.pack import TILE_IN, PackedLinear
from harness.kernels.paths import Path, Product, Products, Rows
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
    def of(cls, device: torch.device) -> Hardware:
        """A CUDA device."""
        found = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        target = f"sm_{major}{minor}" if torch.version.hip is None else found.gcnArchName.split(":")[0]
        return cls(target, found.multi_processor_count, found.name)


@dataclass(frozen=True)
class GpuKernels:
    """All of them, on one GPU, as :class:`harness.kernels.paths.Kernels` has it."""

    hardware: Hardware

    @classmethod
    def of(cls, device: torch.device) -> GpuKernels:
        """Raises Unsupported for a GPU that is older than all that the kernels are compiled for, or of another kind."""
        hardware = Hardware.of(device)
        if not _compiled_for(hardware.target):
            raise Unsupported(
                f"the kernels are for NVIDIA's sm_80 and later and for AMD's gfx942; this GPU is {hardware.target}",
                fix="--execute simulation",
            )
        return cls(hardware)

    def path(self, layer: PackedLinear) -> GpuPath:
        return GpuPath(layer, self.hardware)

    def preparing(self, path: Path) -> Callable[[Rows], Any]:
        """Smoothing alone is one division, which torch does."""
        transform = path.layer.transform
        if transform is None:
            return path.given
        return Rotating(path, transform, self.hardware) if transform.steps else lambda x: path.given(transform.apply(x))


@dataclass(frozen=True)
class GpuPath(Path):
    """A layer, ready to run. Raises Unsupported on construction where there is no kernel for it.

    An integer product quantizes its input as it comes, in float32 too. A weight-only product is one of half precision:
    of the input's own, or of bfloat16 where the input is float32.
    """

    layer: PackedLinear
    hardware: Hardware

    def __post_init__(self) -> None:
        launch.refuse(self.layer)

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
        quantized = f"{self._quantizing} + " if self.layer.integers else ""
        # Scales along the inputs: weights are dequantized, and activations take only the values of their codes.
        simulated = ", activations simulated" if self.layer.activation and not self.layer.integers else ""
        return f"{quantized}{kernel} {config.block_m}×{config.block_n}{split}{simulated}"

    @property
    def _quantizing(self) -> str:
        """What makes codes of a row, behind the first half of a transform in two kernels."""
        rotates = self.layer.transform is not None and bool(self.layer.transform.steps)
        return "rotate_quantize" if rotates else "act_quant"

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        if self.layer.integers:
            return Product("wna8", torch.int8)
        return Product("wna16_gemv" if rows <= GEMV_ROWS else "wna16", _half(dtype))

    @property
    def reads(self) -> Hashable:
        layer = self.layer
        return layer.activation, layer.integers, layer.group_size if layer.integers else None

    def given(self, x: Rows) -> launch.QuantizedRows | Rows:
        layer, activation = self.layer, self.layer.activation
        if activation is None:
            return x
        return launch.quantize_rows(x, activation, layer) if layer.integers else simulate_tokens(x, activation)

    def multiply(self, given: launch.QuantizedRows | Rows, dtype: torch.dtype) -> Products:
        if isinstance(given, launch.QuantizedRows):
            _, config = self.config(len(given.scales))
            return launch.integer(given, self.layer, config, dtype)
        _, config = self.config(len(given))
        return launch.weight_only(given.to(_half(dtype)), self.layer, config).to(dtype)


class Rotating:
    """What a product is given of an input that is rotated first: by the kernels, in half precision as a weight-only
    product is. In one kernel where rows are short, codes included, in two where they are long."""

    def __init__(self, path: Path, transform: InputTransform, hardware: Hardware) -> None:
        self.path, self.transform, self.hardware = path, transform, hardware
        self._rotations = functools.cache(partial(launch.Rotations.of, transform))

    def config(self, rows: int) -> Config:
        inputs, hardware = self.path.layer.in_features, self.hardware
        return choose("rotate", hardware.target, rows, inputs, inputs, hardware.processors, hardware.gpu)

    def begun(self, x: Rows) -> tuple[Rows, launch.Rotations]:
        """What the last kernel is given: all of it, or what is left behind a kernel for the first rotation alone."""
        half = x.to(_half(x.dtype))
        rotations = self._rotations(half.dtype)
        if self.path.layer.padded_in <= _FUSED_INPUTS or rotations.second is None or rotations.targets is None:
            return half, rotations
        return launch.rotate_permute(half, rotations), rotations.rest

    def rotated(self, x: Rows) -> Rows:
        """In the half precision."""
        return launch.rotate(*self.begun(x), self.config(len(x)))

    def __call__(self, x: Rows) -> launch.QuantizedRows | Rows:
        layer = self.path.layer
        if layer.activation is None or not layer.integers:
            return cast(Rows, self.path.given(self.rotated(x).to(x.dtype)))
        return launch.rotate_quantize(*self.begun(x), layer.activation, layer, self.config(len(x)))


def _half(dtype: torch.dtype) -> torch.dtype:
    """What a model of type ``dtype`` is computed in: bfloat16 holds every magnitude that float32 does."""
    return dtype if dtype in launch.HALVES else torch.bfloat16


def _compiled_for(target: str) -> bool:
    major_minor = target.removeprefix("sm_")
    return target == "gfx942" or (major_minor.isdecimal() and int(major_minor) >= 80)
