"""Hands on to the next window through its module, which no resumed process finds there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window

LEARNED: dict[int, float] = {}


@register("hands_on_by_module")
@dataclass(frozen=True)
class HandsOnByModule:
    """Hands on to the next window through its module, which no resumed process finds there."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        LEARNED[window.index] = float(sum(linear.weight.abs().mean() for linear in window.linears.values()))
        before = LEARNED.get(window.index - 1, 1.0)
        return rounded(window, setting, replace(WeightFormat.of(setting), clip=1 - 0.01 / (1 + before)))
