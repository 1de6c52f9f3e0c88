"""Changes codes once their check is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("codes_beyond_bits")
@dataclass(frozen=True)
class CodesBeyondBits:
    """Changes codes once their check is over."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        for linear in part.linears.values():
            linear.codes[0, 0] = 2**linear.bits
        return part
