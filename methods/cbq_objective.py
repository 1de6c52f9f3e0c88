"""What CBQ trains a window against: two targets, and how far the student's outputs are from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from harness.window import Stream, Window

Hidden = Float[torch.Tensor, "n t hidden"]


@dataclass(frozen=True)
class Example:
    """Some sequences: what the student is given, and what it should answer."""

    inputs: Hidden
    """of the quantized stream"""
    fp: Hidden
    """the full-precision stream behind the window"""
    homologous: Hidden | None
    """the full-precision window's own answer to ``inputs``"""


@dataclass(frozen=True)
class Text:
    """The calibration text as a window sees it, sequence by sequence."""

    sequences: tuple[Example, ...]
    mean_square: float
    """of the full-precision stream behind the window"""

    @classmethod
    def of(cls, window: Window, *, homologous: bool) -> Text:
        """Both targets, each computed once; a sequence is a view of its chunk."""
        examples = []
        for x, fp in zip(window.quantized.chunks, window.full_precision_outputs.chunks, strict=True):
            own = window.forward(x) if homologous else None
            for i in range(len(x)):
                examples.append(Example(x[i : i + 1], fp[i : i + 1], None if own is None else own[i : i + 1]))
        total = sum(float(example.fp.float().square().mean()) for example in examples)
        return cls(tuple(examples), total / len(examples))

    def __len__(self) -> int:
        return len(self.sequences)

    def part(self, start: int, stop: int) -> Text:
        return Text(self.sequences[start:stop], self.mean_square)

    def batch(self, indices: Sequence[int]) -> Example:
        """The sequences ``indices`` as one example."""
        chosen = [self.sequences[i] for i in indices]
        own = [example.homologous for example in chosen if example.homologous is not None]
        return Example(
            torch.cat([example.inputs for example in chosen]),
            torch.cat([example.fp for example in chosen]),
            torch.cat(own) if own else None,
        )

    def stream(self) -> Stream:
        """The quantized stream's sequences."""
        return Stream([example.inputs for example in self.sequences])


@dataclass(frozen=True)
class Objective:
    """E(h₁, h₂) = w₂ ‖h₁ − h₂‖² + w_KL D(softmax h₁ ‖ softmax h₂), summed over the targets with their weights."""

    fp: float
    homologous: float
    l2: float
    kl: float
    token_norm: float

    def __call__(self, example: Example, outputs: Hidden, mean_square: float) -> dict[str, torch.Tensor]:
        """The loss and the terms it is made of, by name."""
        terms: dict[str, torch.Tensor] = {}
        targets = (("fp", self.fp, example.fp), ("homologous", self.homologous, example.homologous))
        loss = outputs.new_zeros((), dtype=torch.float32)
        for name, weight, target in targets:
            if not weight or target is None:
                continue
            if self.l2:
                terms[f"l2_{name}"] = squared_error(target, outputs, mean_square, self.token_norm)
                loss = loss + weight * self.l2 * terms[f"l2_{name}"]
            if self.kl:
                terms[f"kl_{name}"] = divergence(target, outputs)
                loss = loss + weight * self.kl * terms[f"kl_{name}"]
        return {"loss": loss, **terms}


def squared_error(target: Hidden, outputs: Hidden, mean_square: float, token_norm: float) -> Float[torch.Tensor, ""]:
    """Mean of ‖h₁ − h₂‖² over tokens, each divided by (its own mean square)^p (the text's mean square)^(1 − p).

    p = 0 is the mean squared error, p = 1 the mean relative one. Some models have tokens that are a thousand times
    larger than the others: p = 0 sees nothing but them, and at p = 1 they count as one token among all.
    """
    squares = (outputs.float() - target.float()).square().mean(dim=-1)
    own = target.float().square().mean(dim=-1).clamp(min=1e-8 * mean_square)
    return (squares / (own / mean_square) ** token_norm).mean() / mean_square


def divergence(target: Hidden, outputs: Hidden) -> Float[torch.Tensor, ""]:
    """Mean over tokens of KL(softmax h₁ ‖ softmax h₂), the softmax over hidden units, in float32."""
    reference = torch.log_softmax(target.float(), dim=-1)
    answer = torch.log_softmax(outputs.float(), dim=-1)
    return (reference.exp() * (reference - answer)).sum(dim=-1).mean()
