"""Uses half of the levels that it is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("wastes_a_bit")
@dataclass(frozen=True)
class WastesABit:
    """Uses half of the levels that it is given."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        coarse = replace(WeightFormat.of(setting), bits=setting.weight_bits - 1)
        linears = {}
        for name, linear in window.linears.items():
            rounded = round_to_nearest(linear.weight, setting, bias=linear.bias, format=coarse)
            linears[name] = replace(rounded, bits=setting.weight_bits)
        return QuantizedWindow(linears, report=tuple({"layer": name} for name in linears))
