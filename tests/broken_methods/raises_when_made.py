"""Raises when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.method import QuantizedWindow, register
from harness.settings import Setting
from harness.window import Window


@register("raises_when_made")
@dataclass(frozen=True)
class RaisesWhenMade:
    """Raises when it is made."""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        raise TypeError("broken on purpose when made")

    def supports(self, setting: Setting) -> str | None:
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        raise AssertionError("not reached")
