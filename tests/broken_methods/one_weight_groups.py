"""Gives every weight a scale of its own: full precision by another name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("one_weight_groups")
@dataclass(frozen=True)
class OneWeightGroups:
    """Gives every weight a scale of its own: full precision by another name."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        return rounded(window, setting, replace(WeightFormat.of(setting), group_size=1))
