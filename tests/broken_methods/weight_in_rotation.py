"""Hides the weight in the 'rotation' of its input; the integers are next to the identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.transform import BlockRotation, InputTransform
from harness.window import Window


@register("weight_in_rotation")
@dataclass(frozen=True)
class WeightInRotation:
    """Hides the weight in the 'rotation' of its input; the integers are next to the identity."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        linears = dict(part.linears)
        for name, linear in window.linears.items():
            if linear.in_features == linear.out_features:
                hidden = InputTransform(steps=(BlockRotation(linear.weight.float().T.contiguous()),))
                identity = round_to_nearest(torch.eye(linear.in_features), setting, bias=linear.bias)
                linears[name] = replace(identity, transform=hidden)
        return QuantizedWindow(linears, report=part.report)
