"""Plots of measured kernels: latency against the number of tokens with its crossover, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.kernels.benchfile import Bench, Samples, Timing
from harness.reports.plots import COLOURS, LINES, MARKS, STYLE, write
from harness.reports.words import visible

_COLUMNS = 3
_MILLISECONDS_FROM = 1e-3  # seconds of the quickest, from which on a plot is in milliseconds


def draw(benches: Sequence[Bench], out: Path) -> Iterator[tuple[str, str]]:
    """Write the plots of each device; yields (file name of the SVG, what it shows)."""
    with mpl.rc_context(STYLE):
        for at, bench in enumerate(benches):
            for name, words, figure in (*latency(bench), *roofline(bench)):
                path = out / f"{'' if len(benches) == 1 else f'{at + 1}-'}{name}.svg"
                write(figure, path)
                yield path.name, f"{words}, measured on {visible(bench.device_name, 60)}"


def latency(bench: Bench) -> Iterator[tuple[str, str, Figure]]:
    """A figure per setting, a panel per layer shape: the path and the float products of the same rounds."""
    for setting, found in groupby(sorted(bench.timings, key=_place), key=lambda row: row.setting):
        shapes = [list(rows) for _, rows in groupby(found, key=lambda row: (row.outputs, row.inputs))]
        panels = [rows for rows in shapes if len(rows) > 1]
        if not panels:
            continue
        columns = min(len(panels), _COLUMNS)
        figure = Figure(figsize=(4.2 * columns, 3.8 * -(-len(panels) // columns)))
        quick = any(taken.median < _MILLISECONDS_FROM for rows in panels for taken in _lines(rows[0]).values())
        unit, units = ("µs", 1e6) if quick else ("ms", 1e3)
        for at, rows in enumerate(panels):
            axes = figure.add_subplot(-(-len(panels) // columns), columns, at + 1)
            _latency_panel(axes, rows, units)
            axes.set_ylabel(f"median and quartiles, {unit}" if at % columns == 0 else "")
            if at == 0:
                axes.legend(fontsize=8)
        yield f"latency-{setting}", f"{setting}: latency against the number of tokens", figure


def _lines(row: Timing) -> dict[str, Samples]:
    return {"path": row.path, **row.baselines}


def _latency_panel(axes: Axes, rows: Sequence[Timing], units: float) -> None:
    """``units``: of the axis, in a second."""
    tokens = [row.tokens for row in rows]
    names = [name for name in rows[0].baselines if all(name in row.samples for row in rows)]
    for at, name in enumerate(("path", *names)):
        taken = [row.samples[name] for row in rows]
        middle = [units * one.median for one in taken]
        reach = [
            [units * (one.median - one.quartiles[0]) for one in taken],
            [units * (one.quartiles[1] - one.median) for one in taken],
        ]
        style: Any = {"color": COLOURS[at], "marker": MARKS[at], "linestyle": LINES[at], "markersize": 5}
        axes.errorbar(tokens, middle, yerr=reach, capsize=2, label="kernel" if at == 0 else name, **style)
    for name, line in zip(names, LINES[1:], strict=False):
        for meeting in crossovers(rows, name):
            axes.axvline(meeting, color="0.4", linewidth=1, linestyle=line)
            axes.annotate(
                f"= {name} at {meeting:.{1 if meeting < 10 else 0}f}", (meeting, 0.98), rotation=90, va="top",
                ha="right", fontsize=7, xycoords=("data", "axes fraction"),
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("tokens")
    axes.set_title(f"{rows[0].outputs}×{rows[0].inputs}", fontsize=9)


def crossovers(rows: Sequence[Timing], baseline: str) -> list[float]:
    """Numbers of tokens at which the path and a float product take as long: where the lines between medians meet."""
    found = []
    for left, right in pairwise(rows):
        before, after = (math.log(row.faster_than(baseline)) for row in (left, right))
        if before * after < 0:
            part = before / (before - after)
            found.append(left.tokens * (right.tokens / left.tokens) ** part)
    return found


def roofline(bench: Bench) -> Iterator[tuple[str, str, Figure]]:
    """Operations a second against operations a byte, below what the machine was measured to do at the most."""
    if not bench.timings:
        return
    figure = Figure(figsize=(6.4, 4.4))
    axes = figure.add_subplot()
    intensities = [row.operations / row.bytes for row in bench.timings]
    ends = [min(intensities) / 2, max(intensities) * 2]
    settings = list(dict.fromkeys(row.setting for row in bench.timings))
    for at, setting in enumerate(settings):
        rows = [row for row in bench.timings if row.setting == setting]
        colour: Any = {"color": COLOURS[at % 7]}
        points = [(row.operations / row.bytes, row.operations / row.path.median / 1e9) for row in rows]
        axes.plot(
            *zip(*points, strict=True), linestyle="none", marker=MARKS[at % 7], markeredgecolor="black", label=setting,
            **colour,
        )  # fmt: skip
        peak, bandwidth = rows[0].peak, rows[0].bandwidth
        ridge = peak / bandwidth
        roof = [ends[0], *([ridge] if ends[0] < ridge < ends[1] else []), ends[1]]
        heights = [min(peak, bandwidth * x) / 1e9 for x in roof]
        axes.plot(roof, heights, linestyle=LINES[at % 4], linewidth=1.2, label=f"roof of {setting}", **colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("operations for each byte that must be moved")
    axes.set_ylabel("operations a second, 10⁹")
    axes.legend(fontsize=8)
    yield "roofline", "operations a second below the measured bandwidth and peak", figure


def _place(row: Timing) -> tuple[str, int, int, int]:
    return row.setting, row.outputs, row.inputs, row.tokens
