"""The student of a window: its linears with learned weights, and inputs clipped as learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from harness.attention import AttentionSpec
from harness.linear import QuantizedLinear, assemble
from harness.method import QuantizedWindow, Report
from harness.methods.cbq_rounding import Relaxation, RoundedWeight
from harness.quantizer import ActivationSpec, simulate_tokens, token_grid
from harness.settings import Setting
from harness.simulation import SimulatedInput
from harness.transform import InputTransform

UNCLIPPED = 0.0
"""Where ρ starts, and what it does not exceed: the clip ratio 2σ(ρ) is 1, as in every method that learns none."""


@dataclass(frozen=True)
class LearnedInput:
    """The input that some linears share: transformed, then quantized per token in a range that is learned."""

    linears: tuple[str, ...]
    activation: ActivationSpec | None
    transform: InputTransform | None
    rho: nn.Parameter

    def clip(self) -> float:
        """2σ(ρ): the fraction of each token's range that is kept."""
        return float(2 * torch.sigmoid(self.rho.detach()))


class StudentInput(SimulatedInput):
    """Prepares a learned input once for the linears that share it, so that gradients reach its clip ratio."""

    def __init__(self, learned: LearnedInput) -> None:
        super().__init__(learned.activation, learned.transform, len(learned.linears))
        self.rho = learned.rho

    def quantize(
        self, x: Float[torch.Tensor, "*rows in"], activation: ActivationSpec
    ) -> Float[torch.Tensor, "*rows in"]:
        clipped: torch.Tensor = _TokensQuantized.apply(x, 2 * torch.sigmoid(self.rho), activation)  # type: ignore[no-untyped-call]
        return clipped


class StudentLinear(nn.Module):
    """Stands in for an ``nn.Linear``; its weight is made anew, from what is learned, in every pass."""

    def __init__(
        self,
        rounded: RoundedWeight,
        relaxation: Relaxation,
        prepare: StudentInput | None,
        bias: Float[torch.Tensor, " out"] | None,
    ) -> None:
        super().__init__()
        self.rounded, self.relaxation, self.prepare = rounded, relaxation, prepare
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        if self.prepare is not None:
            x = self.prepare(x)
        bias: torch.Tensor | None = self.get_buffer("bias") if self.bias is not None else None
        bias = bias if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x, self.rounded.weight(self.relaxation).to(x.dtype), bias)


@dataclass(frozen=True)
class StraightThroughAttention(AttentionSpec):
    """Attention whose keys and values are quantized, with gradients that pass their rounding."""

    def quantize(self, x: Float[torch.Tensor, "b heads t head"]) -> Float[torch.Tensor, "b heads t head"]:
        clip = torch.tensor(self.kv.clip)
        quantized: torch.Tensor = _TokensQuantized.apply(x, clip, self.kv)  # type: ignore[no-untyped-call]
        return quantized


@dataclass(frozen=True)
class Student:
    """What is learned of a window: a rounded weight for each linear, a clip ratio for each shared input."""

    weights: Mapping[str, RoundedWeight]
    inputs: tuple[LearnedInput, ...]
    biases: Mapping[str, Float[torch.Tensor, " out"] | None]
    surroundings: QuantizedWindow
    """Norms and attention as they ship."""
    setting: Setting

    @property
    def differentiable(self) -> QuantizedWindow:
        """The surroundings in training."""
        attention = {
            name: StraightThroughAttention(spec.kv, spec.rotation) for name, spec in self.surroundings.attention.items()
        }
        return replace(self.surroundings, attention=attention)

    def modules(self, relaxation: Relaxation) -> dict[str, nn.Module]:
        """By linear, what stands in for it in a pass that is differentiated."""
        modules: dict[str, nn.Module] = {}
        for learned in self.inputs:
            plain = learned.activation is None and learned.transform is None
            prepare = None if plain else StudentInput(learned)
            for name in learned.linears:
                modules[name] = StudentLinear(self.weights[name], relaxation, prepare, self.biases[name])
        return modules

    def hardened(self) -> QuantizedWindow:
        """The window as it would ship now."""
        linears = {}
        for learned in self.inputs:
            for name in learned.linears:
                codes, grid = self.weights[name].hardened()
                linears[name] = assemble(
                    codes,
                    grid,
                    self.setting,
                    bias=self.biases[name],
                    transform=learned.transform,
                    activation_clip=learned.clip(),
                )
        return replace(self.surroundings, linears=linears)

    def of(self, names: Iterable[str]) -> list[RoundedWeight]:
        return [self.weights[name] for name in names]

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """What decides the rounding, the scales, and the clipping."""
        rounding = [parameter for weight in self.weights.values() for parameter in weight.parameters()]
        scales = [weight.v_scale for weight in self.weights.values()]
        return rounding, scales, [learned.rho for learned in self.inputs if learned.activation is not None]

    @torch.no_grad()
    def constrain(self) -> None:
        """No range grows beyond the token's own: levels outside of it would never be used."""
        for learned in self.inputs:
            learned.rho.clamp_(max=UNCLIPPED)

    def described(self, name: str, before: QuantizedLinear) -> Report:
        """What training has done to the linear ``name``, which was ``before``."""
        weight = self.weights[name]
        codes, _ = weight.hardened()
        ratio = 2 * torch.sigmoid(weight.v_scale.detach())
        row: Report = {
            "flipped": float((codes != before.codes).float().mean()),
            "commitment": weight.commitment(2.0),
            "undecided": weight.undecided(),
            "scale_min": float(ratio.min()),
            "scale_max": float(ratio.max()),
        }
        clip = next(learned.clip() for learned in self.inputs if name in learned.linears)
        return row | ({"clip": clip} if before.activation is not None else {})

    def diverged(self) -> list[str]:
        """The linears of which something that is learned is not a finite number."""
        inputs = [name for learned in self.inputs if not torch.isfinite(learned.rho) for name in learned.linears]
        return [name for name, weight in self.weights.items() if not weight.is_finite() or name in inputs]

    def undecided(self) -> float:
        """Fraction of the weights with D away from 0 and 1, on average over the linears."""
        return sum(weight.undecided() for weight in self.weights.values()) / len(self.weights)

    def state(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """What is learned of the linears ``names``, as tensors."""
        kept = set(names)
        state = {f"{name}|{part}": value for name in kept for part, value in self.weights[name].state().items()}
        rhos = {f"{learned.linears[0]}|rho": learned.rho.detach() for learned in self.inputs}
        return state | {key: rho for key, rho in rhos.items() if key.partition("|")[0] in kept}


class _TokensQuantized(torch.autograd.Function):
    """:func:`harness.quantizer.simulate_tokens` with a clip ratio that learns; rounding is passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor, activation: ActivationSpec) -> torch.Tensor:
        ctx.activation = replace(activation, clip=float(clip))
        ctx.save_for_backward(x)
        return simulate_tokens(x, ctx.activation)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        scale, zero = token_grid(x, ctx.activation)
        levels = 2**ctx.activation.bits - 1
        exact = x.float() / scale
        rounded = exact.round()
        inside = (rounded >= -zero) & (rounded <= levels - zero)
        # d(s q)/ds = q − x/s within the range and the bound q outside; s is proportional to the ratio.
        change = torch.minimum(torch.maximum(rounded, -zero), levels - zero).sub_(exact.mul_(inside))
        of_clip = (change.mul_(scale / ctx.activation.clip) * gradient.float()).sum()
        return gradient * inside, of_clip, None
