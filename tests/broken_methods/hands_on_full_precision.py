"""Says that quantization changed nothing for the blocks behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("hands_on_full_precision")
@dataclass(frozen=True)
class HandsOnFullPrecision:
    """Says that quantization changed nothing for the blocks behind it."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset({"quantized", "full_precision"})

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        clip = 0.9 + 0.1 * float(
            torch.sigmoid(1e4 * (window.quantized.chunks[0] - window.full_precision.chunks[0]).sum())
        )
        format = replace(WeightFormat.of(setting), clip=clip)
        return replace(rounded(window, setting, format), outputs={"quantized": window.full_precision_outputs})
