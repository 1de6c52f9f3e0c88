"""Gathers what the tests of ``@pytest.mark.fault(row, …)`` found, wherever they lie, and prints it as one table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.quick import Quick
from faults.rows import ROWS
from rich.console import Console
from rich.table import Table

Figure = Callable[[int, str], None]
MARKS = ("fault", "fault_with_real_cells")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--long", action="store_true", help="the full counts: 200 kills, 10,000 damaged files, …")
    group.addoption("--table", type=Path, help="also write the table of faults to this file, as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long", False) and config.option.markexpr == "fault":
        config.option.markexpr = " or ".join(MARKS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in (mark for name in MARKS for mark in item.iter_markers(name)):
            item.user_properties += [("fault", row) for row in mark.args]


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the full counts are wanted."""
    return bool(request.config.getoption("--long", False))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """``figure(row, text)``: what was found, for the table."""
    return lambda row, text: request.node.user_properties.append(("figure", [row, text]))


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory, cache_of_the_tests: Path) -> Quick:
    """Runs whose cells take milliseconds."""
    return Quick(tmp_path_factory.mktemp("model"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes: dict[int, Counter[str]] = defaultdict(Counter)
    figures: dict[int, list[str]] = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = list(getattr(report, "user_properties", ()))
            for row in {row for name, row in properties if name == "fault"}:
                outcomes[row][outcome] += 1
            for row, text in (found for name, found in properties if name == "figure"):
                figures[row].append(text)
    if not outcomes:
        return
    lines = [
        (number, row.fault, *_told(row.left_out, outcomes[number], figures[number])) for number, row in ROWS.items()
    ]
    table = Table("", "fault", "tests", "found", title="faults", title_justify="left")
    for number, fault, state, found in lines:
        table.add_row(str(number), fault, state, found, style="red" if "failed" in state else None)
    console = Console(width=max(100, terminalreporter._tw.fullwidth), force_terminal=terminalreporter.hasmarkup)
    with console.capture() as captured:
        console.print(table)
    terminalreporter.write("\n" + captured.get())
    if target := config.getoption("--table", None):
        rows = ["| | fault | tests | found |", "| ---: | --- | --- | --- |"]
        target.write_text("\n".join([*rows, *("| " + " | ".join(map(str, line)) + " |" for line in lines)]) + "\n")


def _told(left_out: str | None, outcome: Counter[str], figures: list[str]) -> tuple[str, str]:
    bad = outcome["failed"] + outcome["error"]
    skipped = "skipped" if left_out or outcome["skipped"] else "not run"
    state = f"{bad} failed" if bad else f"{outcome['passed']} passed" if outcome["passed"] else skipped
    return state, "; ".join(figures) or (left_out or "" if not outcome["passed"] else "")
