"""Supports no setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("supports_nothing")
@dataclass(frozen=True)
class SupportsNothing:
    """Supports no setting."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return f"{setting} is not for me"

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        raise AssertionError("not reached")
