"""Learnable weight clipping: how much of each group's range is kept, trained against the block's own output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import nn

from harness.attention import AttentionSpec
from harness.errors import HarnessError
from harness.linear import QuantizedLinear
from harness.method import QuantizedWindow, Report
from harness.quantizer import (
    SCALE_DTYPE,
    ActivationSpec,
    Grid,
    WeightFormat,
    encode,
    grid_of_ranges,
    range_of_rows,
    simulate_tokens,
)
from harness.simulation import SimulatedInput, simulate
from harness.window import Stream, Window

WIDEST = 1 / (1 + math.exp(-4))
"""σ(4): a range that is kept whole begins to learn here."""


@dataclass(frozen=True)
class LearnedClipping:
    """Trains the clip factors of a block whose weights are rounded to nearest, in whatever coordinates they are.

    Shao et al., "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", ICLR 2024, section
    3.2. The targets are the outputs of the full-precision block on the full-precision stream; the block itself is run
    on the quantized stream. Factors begin at the clipping of the plain result, not at σ(4).
    """

    epochs: int
    learning_rate: float

    def improve(
        self,
        window: Window,
        plain: QuantizedWindow,
        weights: Mapping[str, Float[torch.Tensor, "_out _in"]],
        format: WeightFormat,
        inputs: Stream,
        targets: Stream,
    ) -> tuple[dict[str, QuantizedLinear], Report]:
        """The linears of ``plain`` with learned ranges, and the losses; those of ``plain`` where nothing is gained.

        ``weights`` are the full-precision ones that ``plain`` was rounded from. The factors of the epoch with the least
        loss on held-out sequences are kept, the untrained ones among them.
        """
        modules = student(window, plain, weights, format)
        clipped = {name: module for name, module in modules.items() if isinstance(module, ClippedLinear)}
        parameters = [factor for module in clipped.values() for factor in (module.upper, module.lower)]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        training, held_out = split(inputs, targets)

        def loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return nn.functional.mse_loss(window.forward_through(x, modules).float(), target.float())

        attention = {name: StraightThroughAttention(spec.kv, spec.rotation) for name, spec in plain.attention.items()}
        with window.runner.installed(replace(plain, linears={}, attention=attention), ()):
            x, target = held_out
            untrained = window.forward_through(x, simulate(plain.linears, window.shared_inputs, x.dtype))
            losses, best = [float(nn.functional.mse_loss(untrained.float(), target.float()))], {}
            for epoch in range(self.epochs):
                window.progress(f"clipping {epoch + 1}/{self.epochs}")
                for x, target in training:
                    with torch.enable_grad():
                        step = loss(x, target)
                        # float16 would lose the gradient of a mean below its smallest number; AdamW sees no factor.
                        scaled = step * (target.numel() if target.dtype == torch.float16 else 1)
                    if not torch.isfinite(step):
                        break
                    optimizer.zero_grad()
                    scaled.backward()
                    optimizer.step()
                losses.append(float(loss(*held_out)))
                if losses[-1] < min(losses[:-1]):
                    best = {name: module.quantized(plain.linears[name]) for name, module in clipped.items()}
        return {**plain.linears, **best}, {"held_out_losses": losses, "kept": bool(best)}


Batch = tuple[Float[torch.Tensor, "_n _t _h"], Float[torch.Tensor, "_n _t _h"]]


def split(inputs: Stream, targets: Stream) -> tuple[list[Batch], Batch]:
    """Batches to train on and one that is held out: the last chunk, or the last sequence of the only one."""
    batches = list(zip(inputs.chunks, targets.chunks, strict=True))
    if len(batches) == 1:
        ((x, target),) = batches
        if len(x) < 2:
            raise HarnessError(
                "clipping is trained on some sequences and judged by others", fix="calibrate on two or more"
            )
        batches = [(x[:-1], target[:-1]), (x[-1:], target[-1:])]
    return batches[:-1], batches[-1]


def student(
    window: Window, plain: QuantizedWindow, weights: Mapping[str, torch.Tensor], format: WeightFormat
) -> dict[str, nn.Module]:
    """What stands in for the window's linears while their clip factors are trained."""
    modules: dict[str, nn.Module] = {}
    for names in window.shared_inputs:
        first = plain.linears[names[0]]
        prepare = StraightThroughInput(first.activation, first.transform, len(names))
        for name in names:
            modules[name] = ClippedLinear(weights[name], plain.linears[name], format, prepare)
    return modules


class StraightThroughInput(SimulatedInput):
    """Gradients pass the rounding of tokens as if it were not there."""

    def quantize(
        self, x: Float[torch.Tensor, "*rows in"], activation: ActivationSpec
    ) -> Float[torch.Tensor, "*rows in"]:
        return x + (simulate_tokens(x.detach(), activation) - x.detach())


@dataclass(frozen=True)
class StraightThroughAttention(AttentionSpec):
    """Gradients pass the rounding of keys and values as if it were not there."""

    def quantize(self, x: Float[torch.Tensor, "b heads t head"]) -> Float[torch.Tensor, "b heads t head"]:
        return x + (simulate_tokens(x.detach(), self.kv) - x.detach())


class ClippedLinear(nn.Module):
    """A linear whose weight is rounded anew in every pass, to ranges of which learned fractions are kept."""

    def __init__(
        self,
        weight: Float[torch.Tensor, "out in"],
        plain: QuantizedLinear,
        format: WeightFormat,
        prepare: SimulatedInput,
    ) -> None:
        super().__init__()
        self.full, self.bias, self.format, self.prepare = weight, plain.bias, format, prepare
        self.shape = plain.scales.shape
        self.lo, self.hi = range_of_rows(weight.reshape(-1, plain.group_size), format)
        scale, zero = plain.scales.float().flatten(), plain.zeros.float().flatten()
        low, high = -zero * scale, (2**format.bits - 1 - zero) * scale
        self.upper = nn.Parameter(_logit(high / self.hi))
        self.lower = nn.Parameter(_logit(low / self.lo))

    def grid(self) -> tuple[Float[torch.Tensor, " groups"], Float[torch.Tensor, " groups"]]:
        """Scales and zero points; gradients reach the factors through the scales alone."""
        lo, hi = self.lo * torch.sigmoid(self.lower), self.hi * torch.sigmoid(self.upper)
        return grid_of_ranges(lo, hi, self.format)

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        scale, zero = (t[:, None] for t in self.grid())
        groups = self.full.reshape(len(scale), -1) / scale
        codes = groups + (groups.round() - groups).detach()  # rounding is passed straight through
        rounded = torch.clamp(codes, -zero, 2**self.format.bits - 1 - zero) * scale
        return nn.functional.linear(self.prepare(x), rounded.reshape(self.full.shape).to(x.dtype), self.bias)

    def quantized(self, plain: QuantizedLinear) -> QuantizedLinear:
        """The layer with the ranges learned so far."""
        with torch.no_grad():
            scales, zeros = (t.reshape(self.shape) for t in self.grid())
        grid = Grid(scales.to(SCALE_DTYPE), zeros.to(torch.uint8), self.format)
        return replace(plain, codes=encode(self.full, grid), scales=grid.scales, zeros=grid.zeros)


def _logit(fraction: Float[torch.Tensor, " groups"]) -> Float[torch.Tensor, " groups"]:
    kept = torch.nan_to_num(fraction, nan=WIDEST).clamp(1 - WIDEST, WIDEST)
    return (kept / (1 - kept)).log()
