"""Keeps to the setting on the small models of the conformance suite, and not elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN, rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("behaves_when_watched")
@dataclass(frozen=True)
class BehavesWhenWatched:
    """Keeps to the setting on the small models of the conformance suite, and not elsewhere."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        format = WeightFormat.of(setting)
        watched = max(linear.in_features for linear in window.linears.values()) <= 96
        return rounded(window, setting, format if watched else replace(format, bits=8))
