"""Forgets the last layer of each window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("omits_a_layer")
@dataclass(frozen=True)
class OmitsALayer:
    """Forgets the last layer of each window."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        linears = dict(part.linears)
        linears.popitem()
        return QuantizedWindow(linears, report=part.report)
