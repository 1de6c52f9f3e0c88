"""Returns each weight lying on its side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("wrong_shape")
@dataclass(frozen=True)
class WrongShape:
    """Returns each weight lying on its side."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears = {
            name: round_to_nearest(linear.weight.T.contiguous(), setting, bias=linear.bias)
            for name, linear in window.linears.items()
        }
        return QuantizedWindow(linears, report=tuple({"layer": name} for name in linears))
