"""Never comes back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("hangs")
@dataclass(frozen=True)
class Hangs:
    """Never comes back."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        time.sleep(3600)
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        raise AssertionError("not reached")
