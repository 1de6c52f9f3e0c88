"""Round to nearest: the baseline that every other method has to beat."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.linear import round_to_nearest
from harness.method import QuantizedWindow, Report, StreamName, register
from harness.quantizer import WeightFormat
from harness.settings import UNQUANTIZED, Setting
from harness.window import Window, relative_error


@register("rtn")
@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest level of its group; no calibration data.

    2-bit weights are searched for the best clipping, as the shared quantizer does by default.
    """

    clip_search: bool | None = None
    """search for the clipping with the least error: true, false, or none for at 2 bits only"""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    workspace: ClassVar[dict[str, Any]] = {"weights": 1.0, "squares": 0.0, "streams": 0}
    reads: ClassVar[frozenset[StreamName]] = frozenset()

    def supports(self, setting: Setting) -> str | None:
        return "rtn quantizes weights: choose W2 to W8" if setting.weight_bits == UNQUANTIZED else None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        return rounded(window, setting, WeightFormat.of(setting).searched(self.clip_search))


def rounded(window: Window, setting: Setting, format: WeightFormat) -> QuantizedWindow:
    """Every linear of the window rounded to nearest on the grid of ``format``, and its report."""
    linears, report = {}, list[Report]()
    for name, linear in window.linears.items():
        start = time.monotonic()
        linears[name] = round_to_nearest(linear.weight, setting, bias=linear.bias, format=format)
        error = relative_error(linear.weight, linears[name].weight())
        report.append({"layer": name, "weight_error": error, "seconds": time.monotonic() - start})
    return QuantizedWindow(linears, report=tuple(report))
