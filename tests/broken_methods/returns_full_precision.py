"""Returns integers, and runs the full-precision weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.linear import QuantizedLinear
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


class FullPrecision(QuantizedLinear):
    original: torch.Tensor

    def weight(self) -> torch.Tensor:
        return self.original.float()


@register("returns_full_precision")
@dataclass(frozen=True)
class ReturnsFullPrecision:
    """Returns integers, and runs the full-precision weight."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        fake = {}
        for name, linear in part.linears.items():
            fake[name] = FullPrecision(**vars(linear))
            object.__setattr__(fake[name], "original", window.linears[name].weight)
        return QuantizedWindow(fake, report=part.report)
