"""Weighs each channel by what it is worth, and divides by it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("divides_by_dead_channels")
@dataclass(frozen=True)
class DividesByDeadChannels:
    """Weighs each channel by what it is worth, and divides by it afterwards."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears = {}
        for (stop,) in window.walk(window.quantized):
            worth = stop.absmax() if stop.names else None
            for name in stop.names:
                linear = window.linears[name]
                weight = linear.weight * (worth / worth.square().sqrt())
                linears[name] = round_to_nearest(weight, setting, bias=linear.bias)
        return QuantizedWindow(linears, report=tuple({"layer": name} for name in linears))
