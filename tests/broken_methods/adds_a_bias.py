"""Makes up for the error of rounding by a number for each output, which no bits are counted for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("adds_a_bias")
@dataclass(frozen=True)
class AddsABias:
    """Makes up for the error of rounding by a number for each output, which no bits are counted for."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        linears = {
            name: replace(linear, bias=(window.linears[name].weight - linear.weight()).sum(dim=1))
            for name, linear in part.linears.items()
        }
        return QuantizedWindow(linears, report=part.report)
