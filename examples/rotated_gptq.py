"""Rotation, then GPTQ: two stages chained, without a new option in either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.composition import chain
from harness.method import QuantizedWindow, StreamName, register
from harness.methods.gptq import GPTQ
from harness.settings import Setting
from harness.transform import BlockRotation, InputTransform, block_hadamard, block_size_of
from harness.window import Window


@register("rotated_gptq")
@dataclass(frozen=True)
class RotatedGPTQ:
    """Rotate blocks of every linear's input by a Hadamard matrix, and let GPTQ round the rotated weights.

    The rotation spreads outliers over the channels of a block, which is what 4-bit activations need (Ashkboos et al.,
    "QuaRot", 2024); it runs online, and nothing is folded into norms.
    """

    rotation_size: int | None = None
    """channels in a block; none: the largest power of two up to 128 that divides the layer"""
    damp: float = 0.01
    """GPTQ's λ"""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[StreamName]] = frozenset({"quantized"})

    def supports(self, setting: Setting) -> str | None:
        return GPTQ(damp=self.damp).supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        rotations = {}
        for names in window.shared_inputs:
            size = block_size_of(window.linears[names[0]].in_features, self.rotation_size)
            rotations[names] = InputTransform(steps=(BlockRotation(block_hadamard(size)),))
        return chain(rotations, GPTQ(damp=self.damp), window, setting)
