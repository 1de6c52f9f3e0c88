"""What ``harness bench`` times on a CPU and on a GPU: a path, its parts, and the float products beside it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float

from harness import provenance
from harness.kernels import fixedpoint, integers
from harness.kernels.cpu import (
    DequantizedWeights,
    FewTokens,
    FixedPointWeights,
    Int4Weights,
    IntegerProduct,
    IntegerWeights,
    cpu_path,
    qlinear,
)
from harness.kernels.pack import pack
from harness.kernels.paths import Path
from harness.kernels.timing import CpuTimer, CudaTimer, GraphTimer, Timer
from harness.linear import QuantizedLinear
from harness.transform import BlockRotation, InputTransform, Permutation, block_hadamard, block_size_of

if TYPE_CHECKING:
    from harness.kernels.gpu.path import GpuPath

Work = Callable[[], object]
QUANTIZING, TRANSFORMING = "quantizing the input", "transforming the input"
BOTH = "transforming and quantizing the input, at once"
_SIDE = 1024  # of the square products that tell a CPU's peak; those of a GPU are four times as large


@dataclass(frozen=True)
class Ready:
    """A path on one input. ``works``: what is timed, by name; ``path`` and ``operator`` among them.

    ``redraw`` puts other numbers into the input, in place: what a path may have kept of earlier calls is wrong then.
    """

    operator: str
    given: Float[torch.Tensor, "rows in"]
    redraw: Work
    works: Mapping[str, Work]


class Layer(Protocol):
    """A layer with its path, packed for a machine."""

    def ready(self, x: Float[torch.Tensor, "rows in"]) -> Ready:
        """The path on ``x``, float32 on the CPU."""


class Machine(Protocol):
    """Where paths run. ``device``: ``cpu`` or ``cuda``; ``graph``: a timer without launch costs, if there is one."""

    device: str
    name: str
    timer: Timer
    graph: Timer | None

    def layer(self, linear: QuantizedLinear) -> Layer: ...

    def bandwidth(self) -> float:
        """Bytes a second of summing numbers from memory, the best of some tries."""

    def peak(self, *, integers: bool) -> float:
        """Operations a second of a large square product, the best of some tries."""


# --- CPU -------------------------------------------------------------------------------------------------------------


class Cpu:
    """One thread of this processor."""

    device: str = "cpu"
    graph: Timer | None = None

    def __init__(self, timer: Timer | None = None) -> None:
        torch.set_num_threads(1)
        self.name: str = provenance.cpu()["name"]
        self.timer: Timer = timer or CpuTimer(_flush_bytes())

    def layer(self, linear: QuantizedLinear) -> CpuLayer:
        shape = linear.codes.shape
        return CpuLayer(cpu_path(pack(linear)), torch.randn(shape), torch.randn(shape).bfloat16(), transform_of(linear))

    def bandwidth(self) -> float:
        return _bandwidth(torch.ones(32 << 20), self.timer)

    def peak(self, *, integers: bool) -> float:
        if integers:
            codes = torch.randint(0, 255, (_SIDE, _SIDE), dtype=torch.uint8)
            weight = torch.ops.onednn.qlinear_prepack(torch.randint(-8, 8, (_SIDE, _SIDE), dtype=torch.int8), None)
            scales, zeros = torch.ones(_SIDE), torch.zeros(_SIDE, dtype=torch.int64)
            return _peak([lambda: qlinear(codes, weight, scales, zeros)], _SIDE, self.timer)
        floats = [torch.randn(_SIDE, _SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        return _peak([functools.partial(torch.mm, a, a) for a in floats], _SIDE, self.timer)


@dataclass(frozen=True)
class CpuLayer:
    path: Path
    single: torch.Tensor
    half: torch.Tensor
    transform: InputTransform

    def ready(self, x: Float[torch.Tensor, "rows in"]) -> Ready:
        path, half = self.path, x.bfloat16()
        activation = path.layer.activation
        given = half if activation is None else x

        def redraw() -> None:
            half.copy_(x.normal_())

        works: dict[str, Work] = {
            "path": lambda: path(given),
            "operator": bare(path, given),
            "bfloat16": lambda: torch.nn.functional.linear(half, self.half),
            "float32": lambda: torch.nn.functional.linear(x, self.single),
            TRANSFORMING: lambda: self.transform.apply(given),
        }
        if activation is not None:
            works[QUANTIZING] = lambda: path.given(x)
        return Ready(path.operator(len(x)), given, redraw, works)


def bare(path: Path, x: Float[torch.Tensor, "rows in"]) -> Work:
    """The operator alone, and for integers the quantization that it needs, without the harness around it."""
    if isinstance(path, FewTokens):
        return bare(path.for_rows(len(x)), x)
    if isinstance(path, IntegerWeights):
        activation, group = path.layer.activation, integers.group_of(path.layer)
        codes, count = path.buffer, path.layer.out_features
        assert activation is not None
        return lambda: integers.product(integers.encode(x, activation, group), codes, count)
    if isinstance(path, IntegerProduct):
        return lambda: qlinear(path.given(x)[0], path.weight, path.scales, path.weight_zeros)
    if isinstance(path, FixedPointWeights):
        buffer, outputs = path.buffer, path.layer.out_features
        return lambda: fixedpoint.product(x, buffer, outputs)
    if isinstance(path, Int4Weights):
        qweight, grid, group = path.qweight, path.grid, path.layer.group_size
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, qweight, group, grid)
    assert isinstance(path, DequantizedWeights)
    weight = path.weight
    return lambda: torch.mm(x.bfloat16(), weight.T)


# --- GPU -------------------------------------------------------------------------------------------------------------


class Gpu:
    """The first CUDA device; or, for tests, any device that Triton's interpreter takes."""

    device: str = "cuda"

    def __init__(
        self, at: str = "cuda", name: str | None = None, timer: Timer | None = None, graph: Timer | None = None
    ) -> None:
        from harness.kernels.gpu.path import Hardware

        self.at = at
        here = at == "cuda"
        self.hardware = Hardware.of(torch.device(at)) if here else Hardware("sm_80", 4)
        self.name: str = name or torch.cuda.get_device_name(0)
        self.timer: Timer = timer or CudaTimer()
        self.graph: Timer | None = graph or (GraphTimer() if here else None)

    def layer(self, linear: QuantizedLinear) -> GpuLayer:
        from harness.kernels.gpu.path import GpuPath

        dense = torch.randn(linear.codes.shape, device=self.at)
        transform = transform_of(linear).to(self.at)
        return GpuLayer(GpuPath(pack(linear).to(self.at), self.hardware), dense.half(), dense.bfloat16(), transform)

    def bandwidth(self) -> float:
        return _bandwidth(torch.ones(256 << 20 if self.at == "cuda" else 1 << 20, device=self.at), self.timer)

    def peak(self, *, integers: bool) -> float:
        side = 4 * _SIDE if self.at == "cuda" else 64
        if integers:
            a = torch.randint(-8, 8, (side, side), dtype=torch.int8, device=self.at)
            return _peak([lambda: torch._int_mm(a, a.T)], side, self.timer)
        b = torch.randn(side, side, device=self.at).half()
        return _peak([lambda: b @ b], side, self.timer)


@dataclass(frozen=True)
class GpuLayer:
    path: GpuPath
    half: torch.Tensor
    bfloat: torch.Tensor
    transform: InputTransform

    def ready(self, x: Float[torch.Tensor, "rows in"]) -> Ready:
        from harness.kernels.gpu import launch
        from harness.kernels.gpu.path import Rotating

        path, layer = self.path, self.path.layer
        half, rotating = x.to(self.half.device).half(), Rotating(path, self.transform, path.hardware)
        bfloat = half.bfloat16()

        def redraw() -> None:
            bfloat.copy_(half.normal_())

        works: dict[str, Work] = {
            "path": lambda: path(half),
            "operator": _launches(path, half),
            "float16": lambda: torch.nn.functional.linear(half, self.half),
            "bfloat16": lambda: torch.nn.functional.linear(bfloat, self.bfloat),
            TRANSFORMING: lambda: rotating.rotated(half),
        }
        if (activation := layer.activation) is not None and layer.integers:
            works |= {QUANTIZING: lambda: launch.quantize_rows(half, activation, layer), BOTH: lambda: rotating(half)}
        return Ready(path.operator(len(x)), half, redraw, works)


def _launches(path: GpuPath, x: torch.Tensor) -> Work:
    """The kernels alone, in a configuration that is chosen already."""
    from harness.kernels.gpu import launch

    layer, activation, (_, config) = path.layer, path.layer.activation, path.config(len(x))
    if activation is None or not layer.integers:
        return lambda: launch.weight_only(x, layer, config)
    return lambda: launch.integer(launch.quantize_rows(x, activation, layer), layer, config, x.dtype)


# --- both ------------------------------------------------------------------------------------------------------------


def transform_of(linear: QuantizedLinear) -> InputTransform:
    """One like DuQuant's for a layer's inputs: smooth, rotate, permute, rotate. Which one does not matter."""
    inputs = linear.codes.shape[1]
    rotation = BlockRotation(block_hadamard(block_size_of(inputs)))
    return InputTransform(torch.rand(inputs) + 0.5, (rotation, Permutation(torch.randperm(inputs)), rotation))


def _bandwidth(numbers: torch.Tensor, timer: Timer) -> float:
    seconds = min(timer(numbers.sum, flush=True) for _ in range(5))
    return numbers.numel() * numbers.element_size() / seconds


def _peak(products: list[Work], side: int, timer: Timer) -> float:
    return 2.0 * side**3 / min(timer(product, flush=False) for product in products for _ in range(4))


def _flush_bytes() -> int:
    """Three times the last-level cache, as far as the system tells; 256 MiB at the most and where it does not."""
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return min(3 * size, 256 << 20) or 256 << 20
