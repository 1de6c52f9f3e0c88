"""Measured times of kernels as tables: a table for each device and layer shape. Predictions are not among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from harness.kernels.benchfile import Bench, Samples, Timing, ratio
from harness.tables import Grid

_PARTS = {
    "quantizing the input": "input quantized µs",
    "transforming the input": "input transformed µs",
}
_AT_ONCE = {"transforming and quantizing the input, at once": "both at once µs"}  # by one kernel, on a GPU


def grids(benches: Sequence[Bench]) -> list[Grid]:
    """Median and quartiles, how many times as fast as the float products of the same rounds, and the parts."""
    found = []
    for bench in benches:
        ordered = sorted(bench.timings, key=lambda row: (row.outputs, row.inputs))
        for (outputs, inputs), rows in groupby(ordered, key=lambda row: (row.outputs, row.inputs)):
            members = list(rows)
            floats = list(dict.fromkeys(name for row in members for name in row.baselines))
            without_launches = any(row.graphed for row in members)
            graphs = ("in a graph, warm µs", *(f"× {name} in a graph" for name in floats)) if without_launches else ()
            fused = any(name in row.samples for row in members for name in _AT_ONCE)
            parts = _PARTS | (_AT_ONCE if fused else {})
            header = (
                "setting", "operator", "tokens", "phase", "median µs", "quartiles µs", "n",
                *(f"× {name}" for name in floats), "over bare operator", "% of roofline",
                *parts.values(), *graphs, "",
            )  # fmt: skip
            title = f"{outputs}×{inputs}, measured on {bench.device_name}, {bench.created}"
            found.append(Grid(title, header, tuple(_row(row, floats, parts, without_launches) for row in members)))
    return found


def _row(row: Timing, floats: Sequence[str], parts: Iterable[str], without_launches: bool) -> tuple[str, ...]:
    low, high = map(micro, row.path.quartiles)
    faster = (f"{row.faster_than(name):.2f}" if name in row.samples else "–" for name in floats)
    over = ratio(row.path, row.samples["operator"]) - 1
    alone = (micro(row.samples[name].median) if name in row.samples else "–" for name in parts)
    return (
        row.setting, row.operator, str(row.tokens), row.phase, micro(row.path.median), f"{low}–{high}",
        str(len(row.path.seconds)), *faster, f"{100 * over:+.1f} %", f"{row.percent_of_roofline:.0f}", *alone,
        *(_in_a_graph(row.graphed, floats) if without_launches else ()), "the machine drifted" if row.drifted else "",
    )  # fmt: skip


def _in_a_graph(graphed: Mapping[str, Samples], floats: Sequence[str]) -> tuple[str, ...]:
    """Of the path without its launches, and against float products without theirs."""
    if "path" not in graphed:
        return ("–",) * (1 + len(floats))
    path = graphed["path"]
    return (
        micro(path.median),
        *(f"{ratio(graphed[name], path):.2f}" if name in graphed else "–" for name in floats),
    )


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"
