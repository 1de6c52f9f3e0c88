"""Takes the first sequence for the whole calibration text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("reads_one_batch")
@dataclass(frozen=True)
class ReadsOneBatch:
    """Takes the first sequence for the whole calibration text."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        first = next(iter(window.walk(window.quantized)))[0].chunks[0][0]
        clip = 0.5 + 0.5 * float(torch.sigmoid(first.sum()))
        return rounded(window, setting, replace(WeightFormat.of(setting), clip=clip))
