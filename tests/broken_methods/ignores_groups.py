"""Takes groups that fit instead of those that were asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("ignores_groups")
@dataclass(frozen=True)
class IgnoresGroups:
    """Takes groups that fit instead of those that were asked for."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        format = WeightFormat.of(setting)
        linears = {}
        for name, linear in window.linears.items():
            fits = format.group_size is not None and linear.in_features % format.group_size == 0
            fitting = format if fits else replace(format, group_size=None)
            linears[name] = round_to_nearest(linear.weight, setting, bias=linear.bias, format=fitting)
        return QuantizedWindow(linears, report=tuple({"layer": name} for name in linears))
