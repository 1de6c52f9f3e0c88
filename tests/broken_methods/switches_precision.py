"""Leaves another default dtype and an environment variable behind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("switches_precision")
@dataclass(frozen=True)
class SwitchesPrecision:
    """Leaves another default dtype and an environment variable behind."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        torch.set_default_dtype(torch.float64 if torch.get_default_dtype() == torch.float32 else torch.float32)
        os.environ["BEHIND"] = str(window.index)
        return RTN().quantize(window, setting)
