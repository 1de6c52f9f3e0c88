"""Published numbers beside ours: for every published cell that the harness can run, the difference, and what is known
of its causes. A cell that was never run says so.

``published.csv`` holds facts: a number, the title and table it stands in, and what its source says of the protocol.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from harness.errors import HarnessError
from harness.reports.board import Board, Column, Line, Place
from harness.reports.gathered import Gathered, Group, Known
from harness.settings import Setting
from harness.specs import Scalar
from harness.store import Measured
from harness.tables import number

_FILE = Path(__file__).with_name("published.csv")
NEVER = "never run"
# What a published method is here: the method, the options that it needs, and what is known to differ all the same.
_COUNTERPARTS: Mapping[str, tuple[str, Mapping[str, Scalar], str]] = {
    "fp16": ("fp", {}, ""),
    "rtn": ("rtn", {}, ""),
    "gptq": ("gptq", {}, "act-order here; the source does not say"),
    "gptq_actorder": ("gptq", {}, ""),
    "gptq_reorder": ("gptq", {}, ""),
    "gptq_ada": ("adadim", {}, ""),
    "gptaq": ("gptq", {"asymmetric": 0.25}, ""),
    "duquant": ("duquant", {}, ""),
    "duquant_lwc": ("duquant", {"lwc": True}, ""),
    "cbq": ("cbq", {}, ""),
}
_METRICS = {
    "perplexity": "token_perplexity",
    "acc": "acc",
    "acc_norm": "acc_norm",
    "word_perplexity": "word_perplexity",
}
_TASKS = {
    "wikitext2", "c4", "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "lambada",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One published number, in the harness's words."""

    source: str
    model: str
    method: str
    options: Mapping[str, Scalar]
    setting: str
    task: str
    metric: str
    value: float
    known: tuple[str, ...]


Counterparts = dict[tuple[str, str, str], list[tuple[Group, Known]]]  # by model, method and setting


@cache
def published() -> tuple[Published, ...]:
    """Every published number whose method, setting and task the harness has."""
    with _FILE.open(newline="") as stream:
        return tuple(entry for row in csv.DictReader(stream) if (entry := _entry(row)) is not None)


def boards(gathered: Gathered) -> list[Board]:
    """A table per model: published, ours, the difference, and what is known of it."""
    columns = tuple(Column(name, None, None) for name in ("task", "published", "ours", "difference", "source", "known"))
    found = []
    counterparts: Counterparts = defaultdict(list)
    for group, known in gathered.cells():
        counterparts[known.cell.model, known.cell.method, known.cell.setting].append((group, known))
    ordered = sorted(published(), key=lambda e: (e.model, e.setting != "W16A16", e.setting, e.method, len(e.options)))
    for model, entries in groupby(ordered, key=lambda entry: entry.model):
        lines = [line for entry in entries for line in _lines(entry, counterparts)]
        sections = tuple((setting, tuple(part)) for setting, part in groupby(lines, key=lambda line: line.setting))
        run = sum(line.places[2].value is not None for line in lines)
        note = f"{run} of {len(lines)} published numbers have one of ours beside them"
        found.append(Board(model, "published numbers and ours", columns, sections, (note,), ranked=False))
    return sorted(found, key=lambda board: all(line.places[2].value is None for line in board.lines))


def _entry(row: Mapping[str, str]) -> Published | None:
    if row["method"] not in _COUNTERPARTS or row["metric"] not in _METRICS or row["task"] not in _TASKS:
        return None
    value = float(row["value"])
    setting = "W16A16" if row["setting"] == "FP16" else row["setting"]
    if math.isnan(value) or setting == "unstated":  # NaN in the source is no number to be compared with
        return None
    if setting == "W4A4" and row["kv_bits"] in ("4", "6"):
        setting += f"KV{row['kv_bits']}"
    if not _is_offered(setting):
        return None
    if row["metric"] in ("acc", "acc_norm"):
        value /= 100  # papers print percentages
    method, options, differs = _COUNTERPARTS[row["method"]]
    unstated = [
        f"{what} not stated"
        for what, column in (("KV bits", "kv_bits"), ("granularity of weights", "weight_granularity"))
        if row[column] == "unstated" and row["setting"] != "FP16"
    ]
    known = [part for part in (row["harness_note"], differs, *unstated) if part]
    if row["grade"] == "secondary":
        known.append("quoted by others, not by the authors")
    return Published(
        f"{row['source_title']}, {row['source_table']}", row["model"], method, options, setting, row["task"],
        _METRICS[row["metric"]], value, tuple(known),
    )  # fmt: skip


def _is_offered(setting: str) -> bool:
    try:
        Setting.parse(setting)
    except HarnessError:
        return False
    return True


def _lines(entry: Published, counterparts: Counterparts) -> Iterator[Line]:
    ours = list(_ours(entry, counterparts))
    for group, known, task, row in ours:
        difference = row.value - entry.value
        relative = f" ({100 * difference / entry.value:+.2f} %)" if entry.value else ""
        reasons = [*entry.known, *_reasons(entry, group, known, task)]
        yield _line(
            entry, known.cell.id, group.label(known), f"{known.bits:.2f}" if known.bits else "–", task,
            Place(number(row.value), row.value, n=row.n), f"{difference:+.4g}{relative}", reasons,
        )  # fmt: skip
    if not ours:
        label = ":".join([entry.method, *(f"{name}={_word(value)}" for name, value in entry.options.items())])
        yield _line(entry, "", label, "–", entry.task, Place(NEVER), "–", entry.known)


def _line(
    entry: Published, cell: str, method: str, bits: str, task: str, ours: Place, difference: str, known: Sequence[str]
) -> Line:
    places = (
        Place(f"{task} {entry.metric}"), Place(f"{entry.value:g}", entry.value), ours, Place(difference),
        Place(entry.source), Place("; ".join(known)),
    )  # fmt: skip
    return Line(cell, method, entry.setting, bits, places)


def _ours(entry: Published, counterparts: Counterparts) -> Iterator[tuple[Group, Known, str, Measured]]:
    for group, known in counterparts.get((entry.model, entry.method, entry.setting), ()):
        if entry.options.items() <= known.cell.options.items():
            for task, rows in known.result.tasks.items():
                if task.partition(":")[0].partition(" ")[0] == entry.task:
                    yield from ((group, known, task, row) for row in rows if row.metric == entry.metric)


def _reasons(entry: Published, group: Group, known: Known, task: str) -> Iterator[str]:
    """What of ours is known to differ from a plain evaluation of the whole task."""
    if known.cell.method != "fp":
        yield f"ours is calibrated on {group.terms.calibration}"
    if ":" in task:
        yield f"ours is of a part: {task.partition(':')[2]}"
    if others := {name: value for name, value in known.cell.options.items() if name not in entry.options}:
        yield "our options: " + ", ".join(f"{name}={_word(value)}" for name, value in sorted(others.items()))
    if version := known.manifest(task).get("lm_eval"):
        yield f"ours by lm-eval {version}"


def _word(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
