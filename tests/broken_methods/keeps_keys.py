"""Quantizes keys and values to 8 bits, whatever was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from harness.attention import AttentionSpec
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.quantizer import ActivationSpec
from harness.settings import Setting
from harness.window import Window


@register("keeps_keys")
@dataclass(frozen=True)
class KeepsKeys:
    """Quantizes keys and values to 8 bits, whatever was asked for."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        finer = AttentionSpec(ActivationSpec(8, setting.symmetric))
        return replace(part, attention=dict.fromkeys(window.attention, finer))
