"""The leaderboard as files: what is in it, that it is the same every time, and that names are text in it."""

from __future__ import annotations

import csv
import filecmp
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import CELL, DEMO, FP, HOSTILE, KNOWN, README, make_run, processor_seconds

from harness.errors import HarnessError
from harness.reports.gathered import gather
from harness.reports.site import cell_page, method_page, write_site

SNAPSHOT = Path(__file__).parent / "snapshot"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    write_site(gather([DEMO, KNOWN]), out)
    return out


class Links(HTMLParser):
    """Addresses that a page asks for or leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def pages(site: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(site.rglob("*.html")):
        yield path, path.read_text()


def test_the_leaderboard_of_the_demo_is_as_it_was(tmp_path: Path) -> None:
    """After a wanted change: `tox -e readme -- tests/reports/stores/readme`."""
    write_site(gather([README]), tmp_path / "site")
    kept = [path for path in sorted(SNAPSHOT.rglob("*")) if path.is_file()]
    for path in kept:
        assert (tmp_path / "site" / path.relative_to(SNAPSHOT)).read_text() == path.read_text(), path.name
    assert {path.parent.name for path in kept} == {"snapshot", "data", "cell"}
    assert sum(path.stat().st_size for folder in (README, SNAPSHOT) for path in folder.rglob("*")) < 500_000


def test_the_same_stores_make_the_same_bytes(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    for _ in range(2):  # the second time in place of the first
        write_site(gather([DEMO, KNOWN]), out)
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(site, out, names, shallow=False) == (names, [], [])


def test_every_link_leads_somewhere_and_nowhere_outside(site: Path) -> None:
    count = 0
    for path, text in pages(site):
        for link in Links(text).found:
            if link not in ("data:,", "#main"):
                assert (path.parent / link).resolve().is_file(), (path, link)
                count += 1
    assert count > 100


def test_every_cell_and_method_has_its_page(site: Path) -> None:
    for group, known in gather([DEMO, KNOWN]).cells():
        text = (site / cell_page(group, known)).read_text()
        assert known.cell.id in text
        assert (site / method_page(known.cell.method)).is_file()
    group, gptq = next((g, k) for g, k in gather([KNOWN]).cells() if k.cell.label == "gptq")
    text = (site / cell_page(group, gptq)).read_text()
    assert "model.layers.29.mlp.down_proj" in text  # the last of its layers
    assert "AMD EPYC" in text  # the machine
    assert "16 of 16" in text  # its samples
    assert re.search(r'class="verdict worse">worse<', text)  # than full precision, paired
    assert "does not overlap" not in text
    assert "/models/" not in text  # places on the machine that ran it stay there


def test_a_cell_that_failed_says_why(site: Path) -> None:
    failed = next(text for _, text in pages(site) if "<dd>interrupted" in text)
    assert "no report on the layers" in failed


def test_data_can_be_downloaded_whole(site: Path) -> None:
    rows = json.loads((site / "data/measurements.json").read_text())
    with (site / "data/measurements.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(rows) == len(table) > 20
    assert {row["run"] for row in rows} == {"demo", "known"}
    assert [float(row["value"]) for row in table if row["value"]] == [
        row["value"] for row in rows if row["value"] is not None
    ]
    assert len(json.loads((site / "data/cells.json").read_text())) == 15


def test_what_is_not_comparable_is_told_on_the_page(site: Path) -> None:
    assert "not to be compared with one another" in (site / "index.html").read_text()


def test_only_a_leaderboard_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(HarnessError, match="something else"):
        write_site(gather([KNOWN]), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_hostile_names_are_text_on_every_page(tmp_path: Path) -> None:
    rows = [(replace(CELL, method=name, options={name[:20]: name}), {"piqa": (0.5, 0.01)}, "ok") for name in HOSTILE]
    run = make_run(
        tmp_path / HOSTILE[2], [(FP, {"piqa": (0.6, 0.01)}, "ok"), *rows, (replace(CELL, setting="W2A16"), {}, "error")]
    )
    write_site(gather([run]), tmp_path / "site")
    for path, text in pages(tmp_path / "site"):
        assert "alert(1)</script>" not in text, path
        assert "<img" not in text, path
        assert "<b>=why" not in text, path
        assert "\u202e" not in text, path
    for path in (tmp_path / "site/data").glob("*.js"):
        assert "<" not in path.read_text()
        assert "\u202e" not in path.read_text()
    with (tmp_path / "site/data/cells.csv").open(newline="") as stream:
        assert not [
            value for row in csv.reader(stream) for value in row if value.startswith(("=", "+", "-", "@", "\t"))
        ]


def test_a_leaderboard_takes_as_long_as_it_is_large(tmp_path: Path) -> None:
    """Five times the cells, at most ten times the time; benchmarks/reports_speed.py has the seconds."""
    tasks = {f"task{number}": (0.5 + number / 100, 0.01) for number in range(12)}
    cell = replace(CELL, tasks=tuple(tasks))
    seconds = {}
    for count in (60, 300):
        rows = [(replace(cell, options={"damp": number / 1000}), tasks, "ok") for number in range(count)]
        run = make_run(tmp_path / f"run-{count}", [(replace(FP, tasks=cell.tasks), tasks, "ok"), *rows])
        found = gather([run])
        seconds[count] = processor_seconds(partial(write_site, found, tmp_path / f"site-{count}"))
        assert len(list((tmp_path / f"site-{count}/cell").iterdir())) == count + 1
    assert seconds[300] < 10 * seconds[60]
