"""Scales the embedding, which no window is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.methods.rtn import RTN
from harness.settings import Setting
from harness.window import Window


@register("changes_the_embedding")
@dataclass(frozen=True)
class ChangesTheEmbedding:
    """Scales the embedding, which no window is of."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return RTN().supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        window.runner.modules[""].get_input_embeddings().weight.data.mul_(1.01)
        return RTN().quantize(window, setting)
