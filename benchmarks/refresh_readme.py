"""Put a run of the demo into the README: its table, its plot, and the store and leaderboard that tests compare with.

    python -P benchmarks/refresh_readme.py runs/demo        # or: tox -e readme

The store is copied without layers and artifacts, and without what only tells of the machine that ran it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from harness import store
from harness.planfile import ModelFacts, Plan, read_plan, write_plan
from harness.reports import formats
from harness.reports.gathered import gather
from harness.reports.report import Report
from harness.reports.site import write_site
from harness.runfolder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FIGURE = ROOT / "docs" / "figures" / "demo.svg"
STORE = ROOT / "tests" / "reports" / "stores" / "readme"
SNAPSHOT = ROOT / "tests" / "reports" / "snapshot"
BEGIN, END = "<!-- the demo's table: tox -e readme -->", "<!-- end of the demo's table -->"
LARGEST = 300_000  # bytes of the copied store


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder of the demo")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory(dir=STORE.parent) as beside:
        copied = copy_store(run, Path(beside) / STORE.name)
        size = sum(path.stat().st_size for path in copied.rglob("*") if path.is_file())
        if size > LARGEST:
            raise SystemExit(f"the store has {size} bytes without its layers; tests may keep {LARGEST}")
        shutil.rmtree(STORE, ignore_errors=True)
        copied.rename(STORE)
    README.write_text(with_table(README.read_text(), table()))
    draw()
    snapshot()
    print(f"{README}\n{FIGURE}\n{STORE}: {size} bytes\n{SNAPSHOT}")
    return 0


def copy_store(run: Path, to: Path) -> Path:
    """Plan, store and tasks' results of a run; a later start of it stands for no other machine."""
    folder, copy = RunFolder(run), RunFolder(to)
    plan = read_plan(folder.plan)
    if plan is None:
        raise SystemExit(f"{run}: no run here")
    to.mkdir(parents=True)
    facts = {name: replace(row, path=Path("/models", name)) for name, row in plan.facts.items()}
    write_plan(copy.plan, _elsewhere(plan, facts))
    contents = store.read(folder.store)
    written = store.Store(copy.store)
    kept = {cell.id for cell in plan.cells}
    for number, start in enumerate(contents.runs, 1):
        written.begin(start._replace(provenance=_provenance(start.provenance)))
        for attempt in contents.attempts:
            if attempt.run == number and attempt.cell in kept:
                written.add_attempt(attempt)
    written.add_measured([row for row in contents.measured if row.cell in kept])
    written.close()
    for cell in plan.cells:
        if folder.cell(cell.id).tasks.is_dir():
            shutil.copytree(folder.cell(cell.id).tasks, copy.cell(cell.id).tasks)
    return to


def _elsewhere(plan: Plan, facts: dict[str, ModelFacts]) -> Plan:
    cells = tuple(replace(cell, model_path=f"/models/{cell.model}", data_root=None) for cell in plan.cells)
    return Plan(plan.terms, facts, cells)


def _provenance(text: str) -> str:
    value = json.loads(text)
    return json.dumps(value | {"platform": value["platform"].partition("-")[0]}, sort_keys=True)


def table() -> str:
    """What ``harness report`` prints of the store as Markdown."""
    return formats.markdown(Report.of([STORE]).boards)


def with_table(text: str, table: str) -> str:
    """The README with another table between its marks."""
    before, found, rest = text.partition(BEGIN)
    _, also_found, after = rest.partition(END)
    if not (found and also_found):
        raise SystemExit(f"README.md has no {BEGIN!r} before an {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def draw() -> None:
    """The plot of the first task."""
    from harness.reports.plots import draw

    with tempfile.TemporaryDirectory() as folder:
        name, _ = next(iter(draw(gather([STORE]), Path(folder))))
        shutil.copy(Path(folder, name), FIGURE)


def snapshot() -> None:
    """The pages and data of the leaderboard that depend on the store alone, and of the cells the first two."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        write_site(gather([STORE]), site)
        pages = [site / "index.html", site / "data.html", *(site / "data").iterdir()]
        pages += sorted((site / "cell").iterdir())[:2]
        shutil.rmtree(SNAPSHOT, ignore_errors=True)
        for page in pages:
            copy = SNAPSHOT / page.relative_to(site)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(page, copy)


if __name__ == "__main__":
    sys.exit(main())
