"""Plots of runs, as SVG and PNG, in colours that the colour-blind can tell apart and marks that need no colour."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import orjson
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness import atomic
from harness.reports.gathered import Gathered, Group, Known
from harness.reports.words import visible
from harness.store import Attempt

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
MARKS = ("o", "s", "D", "^", "P", "*", "X")
LINES = ("-", "--", "-.", ":")
STYLE: Any = {
    "svg.hashsalt": "harness", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
    "text.usetex": False, "text.parse_math": False, "figure.constrained_layout.use": True, "savefig.dpi": 150,
}  # fmt: skip
_ERRORS = ("error_ratio", "weight_error", "error")  # of a layer's report, the most telling first
_WIDEST = 60  # characters of a name
_PANELS = 5
_LABELLED = 24  # points; names of more would cover one another
Drawing = tuple[str, str, Figure]


def draw(gathered: Gathered, out: Path) -> Iterator[tuple[str, str]]:
    """Write each plot that the runs have data for; yields (file name of the SVG, what it shows)."""
    kinds: tuple[Callable[[Group], Iterator[Drawing]], ...] = (
        against_bits, recovery, layer_errors, outliers, window_losses, costs,
    )  # fmt: skip
    with mpl.rc_context(STYLE):
        for at, group in enumerate(gathered.groups):
            for kind in kinds:
                for name, words, figure in kind(group):
                    path = out / (f"{name}.svg" if len(gathered.groups) == 1 else f"{at + 1}-{name}.svg")
                    write(figure, path)
                    yield path.name, f"{visible(group.terms.model, _WIDEST)}: {words}"


def write(figure: Figure, path: Path) -> None:
    """As SVG and as PNG beside it, without a date in them: the same data make the same bytes."""
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    with atomic.replacing(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def against_bits(group: Group) -> Iterator[Drawing]:
    """The main number of every task against bits per weight: a panel, with its Pareto front, for each precision of the
    activations, since a number at 4-bit activations is no rival of one at 16."""
    for number, task in enumerate(group.tasks):
        points = [(k, k.bits, row) for k in group.cells if (row := k.row(task)) is not None and k.bits is not None]
        quantized = [point for point in points if not point[0].cell.is_baseline]
        if len(quantized) < 2:
            continue
        up = bool(quantized[0][2].higher_is_better)
        panels = list(dict.fromkeys(_activations(known) for known, _, _ in quantized))[:_PANELS]
        figure = Figure(figsize=(2.2 + 2.6 * len(panels), 4.2))
        first: Axes | None = None
        for at, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), at + 1, sharex=first, sharey=first)
            first = first or axes
            for name, style, members in _by_method(quantized, lambda point: point[0]):
                those = [(bits, row.value, row.stderr or 0.0) for k, bits, row in members if _activations(k) == panel]
                x, y, spread = zip(*those, strict=True) if those else ((), (), ())
                axes.errorbar(x, y, yerr=spread, capsize=2, linestyle="none", label=name, **style)
            front = _front([(bits, row.value) for known, bits, row in quantized if _activations(known) == panel], up)
            label = "Pareto front" if len(front) > 2 else None
            axes.step(*zip(*front, strict=True), where="post", color="0.4", linestyle=":", label=label, zorder=0)
            for known, _, row in points:
                if known.cell.is_baseline:
                    axes.axhline(row.value, color="0.3", linewidth=1, linestyle="--", label="full precision")
            axes.set_title(panel, fontsize=9)
            axes.set_xlabel("bits per weight")
            axes.tick_params(labelleft=at == 0)
        assert first is not None  # there are points, so there is a panel
        _logarithmic_if_wide(first, [row.value for _, _, row in points if row.value > 0], up)
        _bits_axis(first, [bits for _, bits, _ in quantized])
        first.set_ylabel(_label(task, quantized[0][2].metric, up))
        _legend_below(figure)
        yield f"bits-{number + 1}", f"{visible(task)} against bits per weight; bars are standard errors", figure


def recovery(group: Group) -> Iterator[Drawing]:
    """How much of the full-precision accuracy each cell keeps, averaged over the tasks that it has all of."""
    baseline = group.baseline
    if baseline is None:
        return
    tasks = [
        task for task in group.tasks
        if (row := baseline.row(task)) is not None and row.higher_is_better and row.value > 0
    ]  # fmt: skip
    bars = []
    for known in group.cells:
        rows = [known.row(task) for task in tasks]
        if tasks and not known.cell.is_baseline and all(rows):
            both = zip(rows, map(baseline.row, tasks), strict=True)
            parts = [row.value / base.value for row, base in both if row and base]
            bars.append((f"{visible(group.label(known), _WIDEST)} {known.cell.setting}", 100 * sum(parts) / len(parts)))
    if not bars:
        return
    bars = bars[:60]
    figure, axes = _figure(height=1.2 + 0.22 * len(bars))
    axes.barh([name for name, _ in bars], [value for _, value in bars], color=COLOURS[0], edgecolor="black")
    axes.axvline(100, color="0.3", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel(f"% of full precision, mean over {len(tasks)} task{'s' if len(tasks) > 1 else ''}")
    yield "recovery", "accuracy kept of full precision", figure


def layer_errors(group: Group) -> Iterator[Drawing]:
    """A heat map per setting: relative error of every linear of every block, one panel a method."""
    for setting in dict.fromkeys(known.cell.setting for known in group.cells):
        panels = []
        for known in group.cells:
            if known.cell.setting == setting and (grid := _error_grid(report_of(known))) is not None:
                panels.append((visible(group.label(known), 30), *grid))
        if not panels:
            continue
        figure = Figure(figsize=(min(3.4 * len(panels) + 1, 16), 4.6))
        largest: dict[str, float] = {}  # one scale for all panels of a metric
        for _, metric, _, values in panels:
            largest[metric] = max(
                largest.get(metric, 0.0), *(value for row in values for value in row if not math.isnan(value))
            )
        for at, (name, metric, linears, values) in enumerate(panels[:6]):
            axes = figure.add_subplot(1, min(len(panels), 6), at + 1)
            image = axes.imshow(
                values, aspect="auto", cmap="cividis", vmin=0, vmax=largest[metric], interpolation="nearest"
            )
            axes.set_xticks(range(len(linears)), linears, rotation=90)
            axes.set_ylabel("block" if at == 0 else "")
            axes.set_title(f"{name}\n{metric.replace('_', ' ')}", fontsize=9)
            axes.grid(visible=False)
            figure.colorbar(image, ax=axes)
        yield f"layers-{setting}", f"{setting}: error of every layer", figure


def outliers(group: Group) -> Iterator[Drawing]:
    """The largest activations before a method's transform, and after each of its steps, over the layers."""
    for known in group.cells:
        report = [row for row in report_of(known) if len(row.get("largest_values", ())) > 1]
        if not report:
            continue
        figure, axes = _figure(width=8)
        steps = min(len(row["largest_values"]) for row in report)
        names = ["before", *(f"after step {at}" for at in range(1, steps))]
        for at, name in enumerate(names):
            axes.plot(
                [row["largest_values"][at] for row in report], label=name, color=COLOURS[at % 7], linewidth=1,
                linestyle=LINES[at % 4],
            )  # fmt: skip
        _logarithmic(axes)
        axes.set_xlabel("linear layer, in the order of the model")
        axes.set_ylabel("largest absolute input")
        axes.legend()
        label = f"{visible(group.label(known), _WIDEST)} {known.cell.setting}"
        yield f"outliers-{known.cell.id}", f"outliers before and after the transform, {label}", figure


def window_losses(group: Group) -> Iterator[Drawing]:
    """The held-out error of every window before and after training it, and the training loss it ended with."""
    for known in group.cells:
        windows = {row["window"]: row for row in report_of(known) if "held_out" in row and "window" in row}
        if not windows:
            continue
        figure, axes = _figure(width=7)
        order = sorted(windows)
        for at, (name, label) in enumerate(
            (("held_out_before", "held out, before"), ("held_out", "held out, after"), ("loss", "training, at the end"))
        ):
            values = [windows[window][name] for window in order if name in windows[window]]
            if len(values) == len(order):
                style: Any = {"color": COLOURS[at], "marker": MARKS[at], "linestyle": LINES[at]}
                axes.plot(order, values, label=label, markersize=4, **style)
        _logarithmic(axes)
        axes.set_xlabel("window")
        axes.set_ylabel("loss")
        axes.legend()
        label = f"{visible(group.label(known), _WIDEST)} {known.cell.setting}"
        yield f"windows-{known.cell.id}", f"losses of the windows, {label}", figure


def costs(group: Group) -> Iterator[Drawing]:
    """What a cell took to quantize, in seconds and in memory, against the first task's number."""
    tasks = [task for task in group.tasks if any(known.row(task) for known in group.cells)]
    points = [
        (known, known.result.last, row) for known in group.cells
        if tasks and not known.cell.is_baseline and (row := known.row(tasks[0])) is not None and known.result.last
    ]  # fmt: skip
    if len(points) < 2:
        return
    figure = Figure(figsize=(9, 4.4))
    up = bool(points[0][2].higher_is_better)
    kinds: tuple[tuple[str, Callable[[Attempt], float | None]], ...] = (
        ("quantization, s", lambda last: last.quantize_seconds),
        ("peak memory, GB", lambda last: _gigabytes(last.peak_memory_bytes)),
    )
    for at, (title, value) in enumerate(kinds):
        axes = figure.add_subplot(1, 2, at + 1)
        for name, style, members in _by_method(points, lambda point: point[0]):
            those = [(cost, row.value, k) for k, last, row in members if (cost := value(last))]
            if those:
                axes.plot([x for x, _, _ in those], [y for _, y, _ in those], linestyle="none", label=name, **style)
            for x, y, known in those if len(points) <= _LABELLED else ():
                words = visible(known.cell.setting, 20)
                axes.annotate(words, (x, y), xytext=(6, 3), textcoords="offset points", fontsize=6, color="0.35")
        costs_shown = [cost for _, last, _ in points if (cost := value(last))]
        if costs_shown and max(costs_shown) > 20 * min(costs_shown):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(_minor)
        axes.margins(x=0.12)
        _logarithmic_if_wide(axes, [row.value for _, _, row in points if row.value > 0], up)
        axes.set_xlabel(title)
        axes.set_ylabel(_label(tasks[0], points[0][2].metric, up) if at == 0 else "")
    _legend_below(figure)
    yield "costs", f"time and memory of quantization against {visible(tasks[0])}", figure


def report_of(known: Known) -> list[Mapping[str, Any]]:
    """What the method said of every layer; empty where the run folder does not hold it."""
    path = known.folder.quantized_report
    if not path.is_file():
        return []
    return [row for row in orjson.loads(path.read_bytes()).get("report", ()) if isinstance(row.get("layer"), str)]


def _error_grid(report: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], list[list[float]]] | None:
    """(what it is, names of linears, [block][linear]) of the layers' errors."""
    has = (name for name in _ERRORS if report and all(isinstance(row.get(name), float) for row in report))
    metric = next(has, None)
    if metric is None:
        return None
    places = [row["layer"].split(".") for row in report]
    blocks = [next((int(part) for part in parts if part.isdigit()), 0) for parts in places]
    linears = [parts[-1] for parts in places]
    names, order = list(dict.fromkeys(linears)), sorted(set(blocks))
    values = [[float("nan")] * len(names) for _ in order]
    for row, block, linear in zip(report, blocks, linears, strict=True):
        values[order.index(block)][names.index(linear)] = row[metric]
    return metric, names, values


def _figure(width: float = 5.6, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _by_method(points: Sequence[Any], known: Callable[[Any], Known]) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    labels = list(dict.fromkeys(known(point).cell.label for point in points))
    for at, label in enumerate(labels):
        style = {"color": COLOURS[at % 7], "marker": MARKS[at % 7], "markeredgecolor": "black", "markersize": 7}
        yield visible(label, 40), style, [point for point in points if known(point).cell.label == label]


def _front(points: Sequence[tuple[float, float]], up: bool) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for bits, value in sorted(points, key=lambda point: (point[0], -point[1] if up else point[1])):
        if not kept or (value > kept[-1][1] if up else value < kept[-1][1]):
            kept.append((bits, value))
    return [*kept, (max(bits for bits, _ in points), kept[-1][1])]


def _bits_axis(axes: Axes, bits: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = 0.95 * min(bits), 1.05 * max(bits)
    fine = (2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.25, 4.5, 5, 6, 8, 12, 16)
    ticks = [tick for tick in (fine if high < 2 * low else (2, 3, 4, 5, 6, 8, 12, 16)) if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _activations(known: Known) -> str:
    """What of a setting is not the weights: ``A4``, ``A4KV4``."""
    found = re.search(r"A\d+(KV\d+)?", known.cell.setting)
    return found[0] if found else visible(known.cell.setting, _WIDEST)


def _legend_below(figure: Figure) -> None:
    """Each name once, under all panels, where it covers no point."""
    found = {name: what for axes in figure.axes for what, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = min(len(found), 4)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _logarithmic_if_wide(axes: Axes, values: Sequence[float], up: bool) -> None:
    if values and not up and max(values) > 5 * min(values):
        _logarithmic(axes)


def _logarithmic(axes: Axes) -> None:
    """Plain numbers on the axis: names are never read as formulas here, so the usual powers would not be either."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(_minor)


def _minor(value: float, _: float) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _label(task: str, metric: str, up: bool) -> str:
    return f"{visible(task, 40)}\n{visible(metric)} {'↑' if up else '↓'}"


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9
