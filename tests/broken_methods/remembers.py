"""Rounds otherwise the second time it is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window

CALLS: list[int] = []


@register("remembers")
@dataclass(frozen=True)
class Remembers:
    """Rounds otherwise the second time it is asked."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        CALLS.append(window.index)
        return rounded(window, setting, replace(WeightFormat.of(setting), clip=1 - 0.05 * len(CALLS) % 0.5))
