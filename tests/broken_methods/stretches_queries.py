"""'Rotates' queries and keys by a matrix that scales the scores of attention, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from harness.attention import head_size
from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("stretches_queries")
@dataclass(frozen=True)
class StretchesQueries:
    """'Rotates' queries and keys by a matrix that scales the scores of attention, too."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = RTN().quantize(window, setting)
        attention = {}
        for name, spec in window.attention.items():
            stretched = 1.05 * torch.eye(head_size(window.runner.modules[name]))
            attention[name] = replace(spec, rotation=stretched)
        return replace(part, attention=attention)
