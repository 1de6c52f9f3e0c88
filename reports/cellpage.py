"""What the page of a cell shows: how it ended, its numbers, how they were made, its layers, its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import orjson
from markupsafe import Markup, escape

from harness.limits import show_bytes
from harness.reports.gathered import Gathered, Group, Known
from harness.reports.statistics import Comparison
from harness.reports.words import visible
from harness.store import Run
from harness.tables import number

SAMPLES = 20  # shown of each task; all of them lie in the run folder
_NOT_OF_THE_CELL = ("model_path", "data_root")  # places on the machine that ran it
Row = dict[str, Any]


def cell_values(
    gathered: Gathered, group: Group, known: Known, numbers: Mapping[str, tuple[Row, Comparison | None]]
) -> Row:
    """For the template. ``numbers`` holds the judged main number of every task."""
    cell, last = known.cell, known.result.last
    facts = {name: value for name, value in cell.to_json().items() if name not in _NOT_OF_THE_CELL}
    start = known.source.starts[last.run - 1] if last and last.run <= len(known.source.starts) else None
    kept = known.kept_tasks()
    return {
        "title": f"{visible(group.label(known))} {cell.setting}",
        "model": visible(cell.model),
        "method": visible(cell.method),
        "summary": [(name, visible(value)) for name, value in _summary(known)],
        "scores": Markup("\n".join(_scores(known, numbers))),  # every name in it is escaped
        "options": [(visible(name), visible(str(value))) for name, value in sorted(cell.options.items())],
        "facts": visible_json(facts),
        "machine": _machine(start) if start else "",
        "tasks": [(visible(task), visible_json(known.manifest(task))) for task in kept],
        "layers": _layers(known),
        "samples": list(_samples(known, kept)),
        "run": visible(known.source.name),
    }


def visible_json(value: object) -> str:
    """For people: sorted, indented, nothing invisible."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode()
    return "\n".join(map(visible, text.split("\n")))


@cache
def _machine(start: Run) -> str:
    """One machine runs many cells."""
    return visible_json({"started": start.created, **_object(start.provenance)})


def _summary(known: Known) -> Iterator[tuple[str, str]]:
    last = known.result.last
    if last is None:
        yield "status", "pending"
        return
    yield "status", last.status + (f": {last.reason}" if last.reason else "")
    if last.bits_per_weight is not None:
        yield "bits per weight", f"{last.bits_per_weight:.4f}"
    if last.packed_bytes is not None:
        yield "size of the quantized layers", show_bytes(last.packed_bytes)
    if last.quantize_seconds is not None:
        yield "quantization", f"{last.quantize_seconds:.1f} s"
    spent = [row.evaluate_seconds for row in known.result.attempts if row.evaluate_seconds is not None]
    if spent:
        yield "evaluation", f"{sum(spent):.1f} s"
    if last.peak_memory_bytes is not None:
        yield "peak memory", show_bytes(last.peak_memory_bytes)
    yield "attempts", ", ".join(attempt.status for attempt in known.result.attempts)


def _scores(known: Known, numbers: Mapping[str, tuple[Row, Comparison | None]]) -> Iterator[str]:
    """Rows of the table, by hand like those of the layers: a large leaderboard has a hundred thousand."""
    for task in known.cell.tasks:
        rows = known.result.tasks.get(task)
        if not rows:
            yield _score_row(task, "", known.status(task))
        for at, row in enumerate(rows or ()):
            judged, against = numbers[task] if at == 0 else ({}, None)
            low, high = judged.get("low"), judged.get("high")
            yield _score_row(
                task, f"{_html(row.metric)} {'↑' if row.higher_is_better else '↓'}", number(row.value),
                f"{number(low)} to {number(high)}" if low is not None and high is not None else "", str(row.n),
                _difference(against), judged.get("verdict", ""),
            )  # fmt: skip


def _score_row(
    task: str, metric: str, value: str, interval: str = "", n: str = "", against: str = "", verdict: str = ""
) -> str:
    return (
        f'<tr><th scope="row"><bdi>{_html(task)}</bdi></th><td>{metric}</td><td class="number">{value}</td>'
        f'<td class="number">{interval}</td><td class="number">{n}</td><td class="number">{against}</td>'
        + (f'<td><span class="verdict {verdict}">{verdict}</span></td></tr>' if verdict else "<td></td></tr>")
    )


@lru_cache(maxsize=1000)
def _html(name: str) -> str:
    return str(escape(visible(name)))


def _difference(found: Comparison | None) -> str:
    if found is None:
        return ""
    scale, unit = (100.0, " %") if found.relative else (1.0, "")
    ends = found.interval
    between = f" ({scale * ends.low:+.4g} to {scale * ends.high:+.4g})" if ends else ""
    return f"{scale * found.difference:+.4g}{unit}{between}"


def _layers(known: Known) -> Markup:
    """The method's report on every layer as a table; built by hand, since a model has hundreds of layers."""
    path = known.folder.quantized_report
    report = _object(path.read_bytes()).get("report") if path.is_file() else None
    if not report:
        return Markup("")
    names = list(dict.fromkeys(name for row in report for name in row))
    names.sort(key=lambda name: name != "layer")
    head = "".join(f'<th scope="col">{escape(visible(name))}</th>' for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td{_kind(row.get(name))}>{escape(_shown(row.get(name)))}</td>" for name in names)
        + "</tr>\n"
        for row in report
    )
    return Markup(f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>")  # every value is escaped


def _kind(value: object) -> str:
    return ' class="number"' if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{visible(str(name))} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value[:4])) + ("; …" if len(value) > 4 else "")
    return visible(str(value), 120)


def _samples(known: Known, kept: Sequence[str]) -> Iterator[Row]:
    from harness.tasks.result_files import samples_path

    for task in kept:
        if samples_path(*known.place(task)).is_file():
            yield from _samples_of(known, task)


def _samples_of(known: Known, task: str) -> Iterator[Row]:
    from harness.tasks.measurement import read_result

    result = read_result(*known.place(task))
    if result is None:
        return
    measurement = result.measurements[0]
    columns = {name: array for name, array in measurement.samples.items() if array.ndim == 1}
    rows = [[_shown(array[at].item()) for array in columns.values()] for at in range(min(SAMPLES, measurement.n))]
    if rows:
        yield {"task": visible(task), "n": measurement.n, "columns": list(map(visible, columns)), "rows": rows}


def _object(text: str | bytes) -> Row:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
