"""``harness bench``: kernel paths × layer shapes × numbers of tokens, timed where they run and nowhere else.

Every call that is timed gets an input of its own, and the path has to give the right numbers in this very process
before its times are taken and after: what it would keep of earlier calls, or leave out while the clock runs, is of no
use. Timing is per path: all methods without an online transform run the same kernels at one setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from harness import provenance
from harness.artifacts import now
from harness.checkpoint import open_checkpoint
from harness.errors import BadOutput, HarnessError
from harness.kernels.benchfile import BASELINES, IN_A_GRAPH, Bench, Timing
from harness.kernels.machines import Layer, Machine, Ready
from harness.kernels.roofline import Work
from harness.kernels.timing import interleaved
from harness.linear import QuantizedLinear
from harness.presets import resolve_model
from harness.quantizer import ActivationSpec, simulate_tokens
from harness.settings import Setting

# [outputs, inputs] of the distinct linears of a block.
SHAPES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama2-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
_TOLERANCE = 0.01  # relative error (Frobenius) of a path that computes in bfloat16
_ROUNDS = 9


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
    settings: Sequence[Setting], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], machine: Machine
) -> Iterator[Timing]:
    """Every combination. Raises BadOutput for a path that is wrong, which is not timed, Unsupported for none."""
    bandwidth = machine.bandwidth()
    with torch.inference_mode():
        for setting in settings:
            peak = machine.peak(integers=setting.activation_bits < 16)
            for outputs, inputs in shapes:
                linear = random_layer(outputs, inputs, setting)
                layer = machine.layer(linear)
                for count in tokens:
                    yield _timed(layer, linear, count, setting, machine, bandwidth, peak)


def record(timings: Sequence[Timing], machine: Machine) -> Bench:
    """What was measured, with the machine that it was measured on."""
    return Bench(now(), machine.device, machine.name, provenance.capture(1), tuple(timings))


def random_layer(outputs: int, inputs: int, setting: Setting) -> QuantizedLinear:
    """Codes of a random layer; which ones they are does not matter to the time."""
    group = setting.group_size or inputs
    grid = (outputs, inputs // group)
    top = 2**setting.weight_bits
    middle = torch.full(grid, top // 2, dtype=torch.uint8)
    return QuantizedLinear(
        codes=torch.randint(0, top, (outputs, inputs), dtype=torch.uint8),
        scales=(torch.rand(grid) * 0.01 + 0.01).half(),
        zeros=middle if setting.symmetric else torch.randint(0, top, grid, dtype=torch.uint8),
        bits=setting.weight_bits,
        group_size=group,
        activation=ActivationSpec.of(setting),
    )


def _timed(
    layer: Layer, linear: QuantizedLinear, tokens: int, setting: Setting, machine: Machine, bandwidth: float,
    peak: float,
) -> Timing:  # fmt: skip
    outputs, inputs = linear.codes.shape
    ready = layer.ready(torch.randn(tokens, inputs))
    error = _checked_error(ready, linear, setting)
    samples = interleaved(ready.works, machine.timer, rounds=_ROUNDS, before=ready.redraw)
    if machine.graph is not None:
        graphed = {name + IN_A_GRAPH: work for name, work in ready.works.items() if name in ("path", *BASELINES)}
        samples |= interleaved(graphed, machine.graph, rounds=_ROUNDS, before=ready.redraw, flush=False)
    error = max(error, _checked_error(ready, linear, setting))
    work = Work(tokens, outputs, inputs, setting.weight_bits, setting.activation_bits, setting.group_size)
    return Timing(
        str(setting), ready.operator, outputs, inputs, tokens, error, work.bytes, work.operations, bandwidth, peak,
        samples,
    )  # fmt: skip


def _checked_error(ready: Ready, linear: QuantizedLinear, setting: Setting) -> float:
    """Of what is timed, on an input that it has not seen. Raises BadOutput where it is wrong."""
    ready.redraw()
    result = ready.works["path"]()
    assert isinstance(result, torch.Tensor)
    x = ready.given.cpu().float()
    exact = (x if linear.activation is None else simulate_tokens(x, linear.activation)) @ linear.weight().T
    error = float((result.cpu().float() - exact).norm() / exact.norm())
    if not error <= _TOLERANCE:
        raise BadOutput(
            f"{setting} by {ready.operator}: relative error {error:.2g}", fix="it is wrong, so its times are not shown"
        )
    return error
