"""Returns scales that are not a number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("returns_nan")
@dataclass(frozen=True)
class ReturnsNaN:
    """Returns scales that are not a number."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears = {
            name: round_to_nearest(linear.weight, setting, bias=linear.bias) for name, linear in window.linears.items()
        }
        first = next(iter(linears))
        linears[first] = replace(linears[first], scales=torch.full_like(linears[first].scales, float("nan")))
        return QuantizedWindow(linears)
