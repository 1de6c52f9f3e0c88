"""``harness bench``: kernel paths × layer shapes × numbers of tokens, timed where they run and nowhere else.

A time is printed only after the path has given the right numbers in this very process. Timing is per path: all methods
without an online transform run the same kernels at one setting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import atomic, provenance
from harness.artifacts import now
from harness.checkpoint import open_checkpoint
from harness.errors import BadOutput, HarnessError
from harness.kernels.cpu import (
    INT4_OPERATOR,
    CpuPath,
    DequantizedWeights,
    Int4Weights,
    IntegerProduct,
    cpu_path,
)
from harness.kernels.pack import pack
from harness.kernels.roofline import Work
from harness.kernels.timing import CpuTimer, Samples, Timer, interleaved, ratio
from harness.linear import QuantizedLinear
from harness.presets import resolve_model
from harness.quantizer import ActivationSpec, encode_tokens, simulate_tokens
from harness.settings import Setting

# [outputs, inputs] of the distinct linears of a block.
SHAPES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama2-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
NO_CUDA = "not measured (no CUDA device)"
_DECODE_TOKENS = 16  # up to which a product is bound by reading the weight
_TOLERANCE = 0.01  # relative error (Frobenius) of a path that computes in bfloat16
_ROUNDS = 9


@dataclass(frozen=True)
class Timing:
    """One path on one shape. ``samples``: the path, its parts, and the float products of the same rounds."""

    setting: str
    operator: str
    outputs: int
    inputs: int
    tokens: int
    relative_error: float
    samples: Mapping[str, Samples]
    bandwidth: float
    """Bytes a second that this machine reads, measured in the same process."""

    @property
    def phase(self) -> str:
        return "decode" if self.tokens <= _DECODE_TOKENS else "prefill"

    @property
    def work(self) -> Work:
        setting = Setting.parse(self.setting)
        return Work(
            self.tokens, self.outputs, self.inputs, setting.weight_bits, setting.activation_bits, setting.group_size
        )

    def as_dict(self) -> dict[str, Any]:
        path = self.samples["path"]
        return {
            "setting": self.setting, "operator": self.operator, "outputs": self.outputs, "inputs": self.inputs,
            "tokens": self.tokens, "phase": self.phase, "relative_error": self.relative_error,
            "median_seconds": path.median, "quartiles_seconds": path.quartiles,
            "faster_than_bf16": ratio(self.samples["bfloat16"], path),
            "faster_than_fp32": ratio(self.samples["float32"], path),
            "slower_than_bare_operator": ratio(path, self.samples["operator"]),
            "percent_of_bandwidth": 100 * self.work.bytes / path.median / self.bandwidth,
            "drifted": any(samples.drifted for samples in self.samples.values()),
            "samples_seconds": {name: samples.seconds for name, samples in self.samples.items()},
        }  # fmt: skip


def shapes_of(models: Sequence[str]) -> list[tuple[int, int]]:
    """The distinct [outputs, inputs] of the models' block linears: of presets, or of checkpoints on this machine."""
    found: list[tuple[int, int]] = []
    for name in models:
        if name in SHAPES:
            found += SHAPES[name]
            continue
        path = resolve_model(name).path
        if path is None:
            raise HarnessError(
                f"the shapes of {name!r} are not known here", fix=f"harness models fetch {name}, or {', '.join(SHAPES)}"
            )
        found += [(shape[0], shape[1]) for shape in open_checkpoint(path).block_linears().values()]
    return list(dict.fromkeys(found))


def bench(
    settings: Sequence[Setting], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], timer: Timer | None = None
) -> Iterator[Timing]:
    """Every combination on this CPU, one thread. Raises BadOutput for a path that is wrong: it is not timed."""
    torch.set_num_threads(1)
    timer = timer or CpuTimer(_flush_bytes())
    bandwidth = _bandwidth(timer)
    with torch.inference_mode():
        for outputs, inputs in shapes:
            floats = torch.randn(outputs, inputs), torch.randn(outputs, inputs).bfloat16()
            for setting in settings:
                linear = _random(outputs, inputs, setting)
                path = cpu_path(pack(linear))
                for count in tokens:
                    yield _timed(path, linear, floats, count, setting, timer, bandwidth)


def save(timings: Sequence[Timing], folder: Path) -> Path:
    """All of it with raw samples, and the machine that they were taken on."""
    path = folder / "bench.json"
    content = {
        "created": now(), "machine": provenance.capture(1), "load_average": os.getloadavg(), "cuda": NO_CUDA,
        "timings": [timing.as_dict() for timing in timings],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, content)
    return path


def _timed(
    path: CpuPath, linear: QuantizedLinear, floats: tuple[torch.Tensor, torch.Tensor], count: int, setting: Setting,
    timer: Timer, bandwidth: float,
) -> Timing:  # fmt: skip
    x = torch.randn(count, linear.codes.shape[1])
    half, operator = x.bfloat16(), path.operator(count)
    given = half if linear.activation is None else x
    error = _relative_error(path(given), given, linear)
    if error > _TOLERANCE:
        raise BadOutput(f"{setting} by {operator}: relative error {error:.2g}", fix="it is wrong, so it is not timed")
    works: dict[str, Callable[[], object]] = {
        "path": lambda: path(given),
        "operator": _bare(path, given),
        "bfloat16": lambda: torch.nn.functional.linear(half, floats[1]),
        "float32": lambda: torch.nn.functional.linear(x, floats[0]),
    }
    if (activation := linear.activation) is not None:
        works["quantizing the input"] = lambda: encode_tokens(x, activation)
    out, inputs = linear.codes.shape
    return Timing(
        str(setting), operator, out, inputs, count, error, interleaved(works, timer, rounds=_ROUNDS), bandwidth
    )


def _bare(path: CpuPath, x: torch.Tensor) -> Callable[[], object]:
    """The operator alone, and for integers the quantization that it needs, without the harness around it."""
    if isinstance(path, IntegerProduct):
        activation = path.layer.activation
        assert activation is not None

        def integers() -> object:
            codes, _, _ = encode_tokens(x, activation)
            return torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, 0, path.weight, path.scales, path.weight_zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )

        return integers
    if isinstance(path, Int4Weights) and path.operator(len(x)) == INT4_OPERATOR:
        qweight, grid, group = path.qweight, path.grid, path.layer.group_size
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, qweight, group, grid)
    dequantized = path.dequantized if isinstance(path, Int4Weights) else path
    assert isinstance(dequantized, DequantizedWeights)
    weight = dequantized.weight
    return lambda: torch.mm(x.bfloat16(), weight.T)


def _relative_error(y: torch.Tensor, x: torch.Tensor, linear: QuantizedLinear) -> float:
    x = x.float() if linear.activation is None else simulate_tokens(x, linear.activation)
    exact = x @ linear.weight().T
    return float((y.float() - exact).norm() / exact.norm())


def _random(outputs: int, inputs: int, setting: Setting) -> QuantizedLinear:
    """Codes of a random layer; which ones they are does not matter to the time."""
    group = setting.group_size or inputs
    grid = (outputs, inputs // group)
    top = 2**setting.weight_bits
    return QuantizedLinear(
        codes=torch.randint(0, top, (outputs, inputs), dtype=torch.uint8),
        scales=(torch.rand(grid) * 0.01 + 0.01).half(),
        zeros=torch.randint(0, top, grid, dtype=torch.uint8),
        bits=setting.weight_bits,
        group_size=group,
        activation=ActivationSpec.of(setting),
    )


def _flush_bytes() -> int:
    """Three times the last-level cache, as far as the system tells; 256 MiB at the most and where it does not."""
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return min(3 * size, 256 << 20) or 256 << 20


def _bandwidth(timer: Timer) -> float:
    """Bytes a second of summing numbers from memory, the best of some tries."""
    numbers = torch.ones(32 << 20)
    seconds = min(timer(numbers.sum, flush=True) for _ in range(5))
    return numbers.numel() * 4 / seconds
