"""Ignores SIGTERM, and starts a process that left the session and ignores it too."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("clings")
@dataclass(frozen=True)
class Clings:
    """Ignores SIGTERM, and starts a process that left the session and ignores it too."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "3600"], start_new_session=True)
        while True:
            time.sleep(3600)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        raise AssertionError("not reached")
