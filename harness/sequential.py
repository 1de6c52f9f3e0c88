"""Quantize a window one shared input after another, as methods with error feedback do."""

from __future__ import annotations

from collections.abc import Callable

from harness.linear import QuantizedLinear
from harness.method import QuantizedWindow, Report, StreamName
from harness.window import SharedInput, Stream, Window

Step = Callable[[SharedInput, list[SharedInput]], tuple[dict[str, QuantizedLinear], list[Report]]]


def quantize_in_order(
    window: Window, step: Step, *streams: Stream, true_sequential: bool, propagated: bool
) -> QuantizedWindow:
    """Walk ``streams`` side by side and let ``step`` quantize the linears of each shared input.

    ``step`` is given the stop in the first stream and those in the others. With ``true_sequential`` its result runs in
    the first stream from then on; and if that stream is the quantized one (``propagated``), its end is handed on.
    """
    linears: dict[str, QuantizedLinear] = {}
    report: list[Report] = []
    outputs: dict[StreamName, Stream] = {}
    for stop, *others in window.walk(*streams):
        if not stop.names:
            if true_sequential and propagated:
                outputs["quantized"] = Stream(stop.chunks)
            break
        window.progress(stop.names[0])
        quantized, rows = step(stop, others)
        linears |= quantized
        report += rows
        if true_sequential:
            stop.install(quantized)
    return QuantizedWindow(linears, report=tuple(report), outputs=outputs)
