"""The leaderboard: a folder of plain files that opens from a disk, the same bytes from the same stores.

``index.html`` has the table and the plot, ``cell/`` a page for every cell, ``method/`` one for every method, ``data/``
everything as CSV and JSON. No page asks a network for anything.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from harness import results
from harness.errors import HarnessError
from harness.registry import describe_methods
from harness.reports.board import boards
from harness.reports.cellpage import cell_values
from harness.reports.gathered import Gathered, Group, Known
from harness.reports.judged import Judge, Mark, marks
from harness.reports.pages import ASSETS, environment
from harness.reports.statistics import Comparison, verdicts
from harness.reports.words import visible
from harness.specs import show

MARK = ".harness-leaderboard"  # only a folder that holds it, or nothing, is ever replaced
LONG = 2000  # cells; a method's page has no table of more: the leaderboard's can be filtered
TITLE = "Quantization leaderboard"
Row = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """What every page needs."""

    gathered: Gathered
    judge: Judge
    out: Path

    def write(self, path: str, text: str) -> None:
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def page(self, path: str, template: str, **values: object) -> None:
        root = "../" * path.count("/")
        self.write(path, environment().get_template(template).render(root=root, **values))


def write_site(gathered: Gathered, out: Path) -> None:
    """Write the leaderboard into ``out``, in place of an earlier one. Raises HarnessError if it holds other things."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise HarnessError(
            "this folder holds something else than a leaderboard", where=str(out), fix="give an empty or new --out"
        )
    out = out.resolve()
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    site = Site(gathered, Judge.of(gathered), fresh)
    site.write(MARK, "")
    shutil.copytree(ASSETS, fresh / "assets")
    for group in gathered.groups:
        _group(site, group)
    _index(site)
    _methods(site)
    _data(site)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def group_key(group: Group) -> str:
    """A name for files and addresses, and no other group's."""
    digest = hashlib.sha256(repr(tuple(group.terms)).encode()).hexdigest()[:8]
    return f"{_slug(group.terms.model)}-{digest}"


def cell_page(group: Group, known: Known) -> str:
    return f"cell/{known.cell.id}-{group_key(group)[-8:]}.html"


def method_page(name: str) -> str:
    return f"method/{_slug(name)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.html"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "x"


def _index(site: Site) -> None:
    gathered = site.gathered
    site.page(
        "index.html", "index.html", title=TITLE, cells=sum(len(group.cells) for group in gathered.groups),
        models=len({group.terms.model for group in gathered.groups}), notes=[*map(visible, gathered.notes)],
        runs=[visible(source.name) for source in gathered.sources], basis=site.judge.basis,
    )  # fmt: skip
    tables = Counter(group.terms.model for group in gathered.groups)
    index = [
        {"key": group_key(group), "title": _title(group, apart=tables[group.terms.model] > 1)}
        for group in gathered.groups
    ]
    site.write("data/index.js", f"window.HARNESS = {{ index: {_script(index)} }};\n")


def _title(group: Group, *, apart: bool) -> str:
    name = visible(group.terms.model, 120)
    return f"{name} ({visible(group.terms.words)})" if apart else name


def _group(site: Site, group: Group) -> None:
    """The data of the group's table, and the pages of its cells."""
    columns = {task: _judged_column(site.judge, group, task) for task in group.tasks}
    cells = [_cell_row(group, known) for known in group.cells]
    value = {
        "title": visible(group.terms.model, 120),
        "terms": visible(group.terms.words),
        "tasks": group.tasks,
        "metrics": [_metric(group, task) for task in group.tasks],
        "cells": cells,
        "numbers": [[row for row, _ in column] for column in columns.values()],
        "baseline": next((at for at, known in enumerate(group.cells) if known is group.baseline), None),
    }
    key = group_key(group)
    site.write(f"data/{key}.js", f"window.HARNESS.take({_script(key)}, {_script(value)});\n")
    template = environment().get_template("cell.html")
    (site.out / "cell").mkdir(exist_ok=True)
    for at, known in enumerate(group.cells):
        numbers = {task: column[at] for task, column in columns.items()}
        values = cell_values(site.gathered, group, known, numbers)
        text = template.render(root="../", method_page="../" + method_page(known.cell.method), **values)
        (site.out / cell_page(group, known)).write_text(text)


def _cell_row(group: Group, known: Known) -> Row:
    last = known.result.last
    return {
        "method": visible(group.label(known), 120), "setting": known.cell.setting, "bits": known.bits,
        "seconds": last.quantize_seconds if last else None, "page": cell_page(group, known),
        "baseline": known.cell.is_baseline,
        "memory": last.peak_memory_bytes / 1e9 if last and last.peak_memory_bytes is not None else None,
    }  # fmt: skip


def _metric(group: Group, task: str) -> Row:
    row = next((row for known in group.cells if (row := known.row(task)) is not None), None)
    return {"metric": row.metric, "up": bool(row.higher_is_better)} if row else {"metric": None, "up": None}


def _judged_column(judge: Judge, group: Group, task: str) -> list[tuple[Row, Comparison | None]]:
    """A row per cell: its number, its rank within the setting, and its difference from the baseline with a verdict.

    The verdicts of a column are corrected together: at most one time in twenty is any of them wrong.
    """
    ranks: dict[str, Mark] = {}
    for _, members in groupby(group.cells, key=lambda known: known.cell.setting):
        ranks |= marks(judge, [known for known in members if not known.cell.is_baseline], task)
    compared = {
        known.cell.id: found
        for known in group.cells
        if group.baseline is not None and known is not group.baseline
        and (found := judge.compare(group.baseline, known, task)) is not None
    }  # fmt: skip
    claims = dict(zip(compared, verdicts(list(compared.values())), strict=True))
    rows = []
    for known in group.cells:
        id = known.cell.id
        estimate, against = judge.estimate(known, task), compared.get(id)
        interval = estimate.interval if estimate else None
        rows.append(({
            "value": _rounded(estimate.value) if estimate else None,
            "low": _rounded(interval.low) if interval else None,
            "high": _rounded(interval.high) if interval else None,
            "n": estimate.n if estimate else None,
            "status": "ok" if estimate else known.status(task),
            "mark": ranks.get(id, ""),
            "difference": _rounded(against.difference) if against else None,
            "relative": against.relative if against else False,
            "verdict": claims.get(id, ""),
        }, against))  # fmt: skip
    return rows


def _rounded(value: float) -> float:
    """Six digits: the same on every processor, whatever the order of its sums. The downloads have all of them."""
    return float(f"{value:.6g}")


def _methods(site: Site) -> None:
    infos = describe_methods()
    cells = list(site.gathered.cells())
    found = boards(site.gathered, site.judge) if len(cells) <= LONG else []
    entries = []
    for name in sorted({known.cell.method for _, known in cells}):
        info = infos.get(name)
        summary = visible(info.summary if info else "A method from outside this package.")
        options = [(option.name, option.kind, show(option.default)) for option in info.options] if info else []
        pages = {k.cell.id: "../" + cell_page(group, k) for group, k in cells if k.cell.method == name}
        site.page(
            method_page(name), "method.html", name=visible(name), summary=summary, options=options, pages=pages,
            boards=[part for board in found if (part := board.only(pages)).sections],
        )  # fmt: skip
        entries.append({"name": visible(name), "page": method_page(name), "summary": summary})
    site.page("methods.html", "methods.html", methods=entries)


def _data(site: Site) -> None:
    """All rows of all runs, as ``harness results`` gives them, with the run and what its cells share."""
    files = []
    kinds = (("measurements", results.MEASUREMENT_KEYS), ("cells", results.CELL_KEYS))
    for kind, keys in kinds:
        for suffix in ("csv", "json"):
            rows = _rows(site.gathered, kind)
            name = f"data/{kind}.{suffix}"
            with (site.out / name).open("w", newline="") as stream:
                if suffix == "csv":
                    results.write_csv(rows, (*keys, "run", "terms"), stream)
                else:
                    results.write_json(rows, stream)
            files.append((name, kind, suffix.upper(), (site.out / name).stat().st_size))
    site.page("data.html", "data.html", files=files, columns=[(kind, keys) for kind, keys in kinds])


def _rows(gathered: Gathered, kind: str) -> Iterator[Row]:
    for group, known in gathered.cells():
        rows: Iterator[Row]
        if kind == "cells":
            rows = results.cell_rows([known.result], known.source.path)
        else:
            rows = results.measurement_rows([known.result])
        for row in rows:
            yield {**row, "run": known.source.name, "terms": group.terms.words}


def _script(value: object) -> str:
    """JSON that is JavaScript too, wherever it stands."""
    text = orjson.dumps(value).decode()
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
