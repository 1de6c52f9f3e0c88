"""Raises while it quantizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("raises")
@dataclass(frozen=True)
class Raises:
    """Raises while it quantizes."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        raise ValueError("broken on purpose")
