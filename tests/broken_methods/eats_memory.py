"""Takes all the memory it gets."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("eats_memory")
@dataclass(frozen=True)
class EatsMemory:
    """Takes all the memory it gets."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1 << 20)) * 32)
            time.sleep(0.005)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        raise AssertionError("not reached")
