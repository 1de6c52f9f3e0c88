"""Rounds to 5 bits whatever was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("five_bits")
@dataclass(frozen=True)
class FiveBits:
    """Rounds to 5 bits whatever was asked for."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        return rounded(window, setting, replace(WeightFormat.of(setting), bits=5))
