"""Doubles the norms and not the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("changes_the_function")
@dataclass(frozen=True)
class ChangesTheFunction:
    """Doubles the norms and not the weights that read them."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        doubled = {
            f"{name}.weight": 2 * module.weight
            for name, module in window.runner.modules.items()
            if name.startswith(tuple(f"{block.name}." for block in window.blocks)) and "norm" in name
        }
        return QuantizedWindow(part.linears, norms=doubled, report=part.report)
