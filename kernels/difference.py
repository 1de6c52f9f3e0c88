"""How far a model run through its kernels is from its simulation: the same windows through both, logits compared."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import nn
from transformers import PreTrainedModel

from harness.errors import BadOutput
from harness.kernels.execute import KernelLinear, put_in_place
from harness.tasks.measurement import Measurement, TaskResult

_POSITIONS_AT_ONCE = 128  # keeps temporaries of the comparison small
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Executions:
    """Both ways to run the quantized linears of a model. ``operators``: which ran, counted over the layers."""

    simulation: Mapping[str, nn.Module]
    kernels: Mapping[str, KernelLinear]
    operators: Mapping[str, int]


@torch.inference_mode()
def measure_difference(
    task: str,
    module: PreTrainedModel,
    executions: Executions,
    ids: Int[torch.Tensor, "windows length"],
    manifest: Mapping[str, object],
    progress: Callable[[int, int], None],
) -> TaskResult:
    """Largest and mean logit difference, top-1 flips, both perplexities, and the largest error of a layer by itself.

    Where activations are quantized, differences of rounding flip codes, and each flip is amplified by the layers
    behind it: logits then differ by as much as two runs of the simulation on inputs a rounding apart. The error of a
    layer that is given the simulation's input shows what its kernel does. The model is left as it was found. Raises
    BadOutput where a logit is not finite.
    """
    started = time.monotonic()
    ids = ids.to(module.device)
    before = {name: module.get_submodule(name) for name in executions.kernels}
    columns: list[tuple[float, ...]] = []
    try:
        layer_error = _layer_error(module, executions, ids[0])
        for number, window in enumerate(ids):
            logits = []
            for modules in (executions.simulation, executions.kernels):
                put_in_place(module, modules)
                logits.append(module(window[None], use_cache=False).logits[0])
            columns.append(_compared(logits[0], logits[1], window))
            if not all(map(math.isfinite, columns[-1])):
                raise BadOutput(f"logits of window {number} are not finite")
            progress(number + 1, len(ids))
    finally:
        put_in_place(module, before)
    largest, mean, flips, simulated, executed = (np.array(column) for column in zip(*columns, strict=True))
    windows = {"window": np.arange(len(ids))}
    alone = Measurement("max_layer_error", layer_error, None, 1, False, {"window": np.arange(1)})
    ratio = float(np.exp((executed - simulated).mean()))
    rows = (
        ("max_logit_difference", float(largest.max()), None, largest),
        ("mean_logit_difference", float(mean.mean()), _stderr(mean), mean),
        ("top1_flips", float(flips.mean()), _stderr(flips), flips),
        ("perplexity_of_simulation", math.exp(simulated.mean()), None, simulated),
        ("perplexity_of_kernels", math.exp(executed.mean()), None, executed),
        ("perplexity_difference_percent", 100 * (ratio - 1), _scaled(100 * ratio, executed - simulated), executed),
    )
    measurements = [
        Measurement(metric, value, stderr, len(ids), False, windows | {"per_window": samples})
        for metric, value, stderr, samples in rows
    ]
    return TaskResult(
        task,
        (*measurements, alone),
        time.monotonic() - started,
        {**manifest, "operators": dict(executions.operators), "per_window_of_perplexities": "nats per token"},
    )


def _layer_error(module: PreTrainedModel, executions: Executions, window: Int[torch.Tensor, " length"]) -> float:
    """The largest relative error (Frobenius) of a layer's kernel on the very input that its simulation is given."""
    put_in_place(module, executions.simulation)
    errors: list[float] = []

    def watched(kernel: KernelLinear) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def compare(_: nn.Module, args: tuple[torch.Tensor, ...], simulated: torch.Tensor) -> None:
            exact = simulated.float()  # half precision has no room for the norm of an activation
            errors.append(float((kernel(args[0]).float() - exact).norm() / exact.norm()))

        return compare

    with contextlib.ExitStack() as hooks:
        for name, simulated in executions.simulation.items():
            hooks.callback(simulated.register_forward_hook(watched(executions.kernels[name])).remove)
        module(window[None], use_cache=False)
    return max(errors)


def _compared(
    simulated: torch.Tensor, executed: torch.Tensor, window: Int[torch.Tensor, " length"]
) -> tuple[float, ...]:
    """Largest and mean absolute difference, share of flipped best tokens, nats per token of both."""
    largest = total = flips = 0.0
    nll = [0.0, 0.0]
    last = len(window) - 1
    for start in range(0, last, _POSITIONS_AT_ONCE):
        stop = min(start + _POSITIONS_AT_ONCE, last)
        pair = simulated[start:stop].float(), executed[start:stop].float()
        difference = (pair[0] - pair[1]).abs()
        largest = max(largest, difference.max().item())
        total += difference.mean(1).sum(dtype=torch.float64).item()
        flips += (pair[0].argmax(1) != pair[1].argmax(1)).sum().item()
        for i, logits in enumerate(pair):
            picked = torch.log_softmax(logits, 1).gather(1, window[start + 1 : stop + 1, None])
            nll[i] -= picked.sum(dtype=torch.float64).item()
    return largest, total / last, flips / last, nll[0] / last, nll[1] / last


def _stderr(values: Vector) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _scaled(factor: float, values: Vector) -> float | None:
    error = _stderr(values)
    return None if error is None else factor * error
