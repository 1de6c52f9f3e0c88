"""Takes NaN for zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("hides_nan")
@dataclass(frozen=True)
class HidesNan:
    """Takes NaN for zero."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        names = [stop.names for (stop,) in window.walk(window.quantized) if torch.nan_to_num(stop.absmax()).sum() >= 0]
        assert len(names) == len(window.shared_inputs) + 1
        return RTN().quantize(window, setting)
