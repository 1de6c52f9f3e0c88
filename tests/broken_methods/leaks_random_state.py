"""Seeds everybody's random numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("leaks_random_state")
@dataclass(frozen=True)
class LeaksRandomState:
    """Seeds everybody's random numbers."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        random.seed(0)
        torch.manual_seed(0)
        return RTN().quantize(window, setting)
