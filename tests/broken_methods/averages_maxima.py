"""Takes the mean over chunks of each chunk's maxima, which depends on how sequences are batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.transform import InputTransform
from harness.window import Window


@register("averages_maxima")
@dataclass(frozen=True)
class AveragesMaxima:
    """Takes the mean over chunks of each chunk's maxima, which depends on how sequences are batched."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears = {}
        for (stop,) in window.walk(window.quantized):
            if stop.names:
                top = torch.stack([x.abs().amax(dim=0) for x in stop.tokens()]).mean(dim=0)
                smoothed = InputTransform(smooth=top.clamp(min=1e-5).sqrt())
            for name in stop.names:
                linear = window.linears[name]
                linears[name] = round_to_nearest(linear.weight, setting, bias=linear.bias, transform=smoothed)
        return QuantizedWindow(linears, report=tuple({"layer": name} for name in linears))
