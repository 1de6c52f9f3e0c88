"""``plan.json``: the cells of a run folder, and what they have in common. It grows; what it fixes, stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from harness import atomic
from harness.cells import FORMAT, Cell
from harness.errors import HarnessError, Problems
from harness.settings import FULL_PRECISION

if TYPE_CHECKING:  # a plan is read without what it takes to make one
    from harness.plan import Draft


@dataclass(frozen=True)
class ModelFacts:
    """What :mod:`harness.prepare` found out about a model."""

    path: Path
    weights_sha256: str
    calibration_sha256: str | None  # None: no method of the run looks at calibration data
    checked_tasks: tuple[str, ...] = ()  # against which the calibration text was compared


@dataclass(frozen=True)
class Plan:
    """All cells that were ever asked of a run folder, in the order of its tables. ``terms`` hold for every one."""

    terms: Mapping[str, str]
    facts: Mapping[str, ModelFacts]
    cells: tuple[Cell, ...]


def read_plan(path: Path) -> Plan | None:
    """The plan of a run folder, None if there is none yet. Raises HarnessError for a file that is not one."""
    if not path.is_file():
        return None
    try:
        value = orjson.loads(path.read_bytes())
        if value["format"] != FORMAT:
            raise HarnessError(
                f"the plan has format {value['format']}; this harness reads format {FORMAT}",
                where=str(path), fix="use the harness that wrote it, or another --out",
            )  # fmt: skip
        return Plan(
            terms=dict(value["terms"]),
            facts={name: _facts(row) for name, row in value["models"].items()},
            cells=tuple(Cell.from_json(cell) for cell in value["cells"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarnessError(f"the plan cannot be read: {error!r}", where=str(path), fix="use another --out") from error


def write_plan(path: Path, plan: Plan) -> None:
    """Written only when it differs from what is there."""
    if read_plan(path) == plan:
        return
    models = {name: asdict(facts) | {"path": str(facts.path)} for name, facts in plan.facts.items()}
    cells = [cell.to_json() for cell in plan.cells]
    atomic.write_json(path, {"format": FORMAT, "terms": dict(plan.terms), "models": models, "cells": cells})


def terms_of(draft: Draft) -> dict[str, str]:
    """What all cells of a run must share to be compared on equal terms."""
    return {
        "calibration": str(draft.calibration), "seed": str(draft.seed), "dtype": draft.dtype, "device": draft.device,
        "execute": draft.execute,
    }  # fmt: skip


def refuse_other_terms(old: Plan | None, draft: Draft, where: Path) -> None:
    """Raises Problems when the folder was begun on other terms."""
    problems = [
        _other(name, old.terms.get(name, "?"), value, where)
        for name, value in terms_of(draft).items()
        if old is not None and old.terms.get(name) != value
    ]
    if problems:
        raise Problems(problems)


def grown(old: Plan | None, draft: Draft, facts: Mapping[str, ModelFacts], cells: Sequence[Cell], where: Path) -> Plan:
    """The plan with the cells of a new command. A cell whose method has changed since takes the place of the old one.

    Raises Problems when a model or its calibration tokens are not what they were.
    """
    if old is None:
        return Plan(terms_of(draft), dict(facts), tuple(cells))
    problems = [
        _other(f"{part.replace('_sha256', '')} of {name}", str(before)[:16], str(after)[:16], where)
        for name in facts.keys() & old.facts.keys()
        for part in ("weights_sha256", "calibration_sha256")
        if (before := getattr(old.facts[name], part)) != (after := getattr(facts[name], part)) and before is not None
    ]
    if problems:
        raise Problems(problems)
    by_place = {cell.place: cell for cell in old.cells}
    for cell in cells:
        before_cell = by_place.get(cell.place)
        known = before_cell.tasks if before_cell is not None and before_cell.id == cell.id else ()
        by_place[cell.place] = replace(cell, tasks=tuple(dict.fromkeys([*known, *cell.tasks])))
    return Plan(old.terms, {**old.facts, **facts}, tuple(ordered(by_place.values())))


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """By model, then setting (unquantized first), then method, each in the order in which it was first asked for."""
    cells = list(cells)
    models = list(dict.fromkeys(cell.model for cell in cells))
    settings = list(dict.fromkeys([str(FULL_PRECISION), *(cell.setting for cell in cells)]))
    methods = list(dict.fromkeys(cell.label for cell in cells))
    return sorted(
        cells,
        key=lambda c: (models.index(c.model), settings.index(c.setting), not c.is_baseline, methods.index(c.label)),
    )


def _facts(row: Mapping[str, Any]) -> ModelFacts:
    return ModelFacts(Path(row["path"]), row["weights_sha256"], row["calibration_sha256"], tuple(row["checked_tasks"]))


def _other(name: str, before: str, after: str, where: Path) -> HarnessError:
    return HarnessError(
        f"this run has {name} {before}, and the command asks for {after}", where=str(where),
        fix="use another --out: all cells of a run share their calibration, seed, precision and weights",
    )  # fmt: skip
