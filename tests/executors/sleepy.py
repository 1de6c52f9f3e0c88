"""Rounds to nearest; the first time it sleeps for ten minutes first, after it has left a note that it does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import rounded
from harness.quantizer import WeightFormat
from harness.settings import Setting
from harness.window import Window


@register("sleepy")
@dataclass(frozen=True)
class Sleepy:
    """Rounds to nearest, later."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    workspace: ClassVar[dict[str, Any]] = {"weights": 1.5, "squares": 0.0, "streams": 0}
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        note = Path(__file__).with_suffix(".note")
        if not note.exists():
            note.write_text(str(os.getpid()))
            time.sleep(600)
        return rounded(window, setting, WeightFormat.of(setting))
