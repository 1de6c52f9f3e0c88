"""Quantize a window one shared input after another, as methods with error feedback do."""

from __future__ import annotations

from collections.abc import Callable

from harness.linear import QuantizedLinear
from harness.method import QuantizedWindow, Report, StreamName
from harness.window import SharedInput, Stream, Window

Step = Callable[[SharedInput, list[SharedInput]], tuple[dict[str, QuantizedLinear], list[Report]]]


def quantize_in_order(window: Window, step: Step, *names: StreamName, true_sequential: bool) -> QuantizedWindow:
    """Walk the streams ``names`` side by side and let ``step`` quantize the linears of each shared input.

    ``step`` is given the stop in the first stream and those in the others. With ``true_sequential`` its result runs in
    the first stream from then on. Streams that end as they should behind the quantized window are handed on.
    """
    linears: dict[str, QuantizedLinear] = {}
    report: list[Report] = []
    outputs: dict[StreamName, Stream] = {}
    for stop, *others in window.walk(*(window.stream(name) for name in names)):
        if not stop.names:
            right = ("quantized" if true_sequential else "full_precision", *names[1:])
            ends = zip(names, right, (stop, *others), strict=True)
            outputs = {name: Stream(end.chunks) for name, due, end in ends if name == due}
            break
        window.progress(stop.names[0])
        quantized, rows = step(stop, others)
        linears |= quantized
        report += rows
        if true_sequential:
            stop.install(quantized)
    return QuantizedWindow(linears, report=tuple(report), outputs=outputs)
