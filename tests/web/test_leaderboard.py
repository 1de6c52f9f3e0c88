"""The leaderboard in a real browser: Debian's Chromium without a head, driven by Playwright; axe-core for contrast.

`tox -e web` installs what this needs. Elsewhere it is skipped, saying what is missing.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import CELL, DEMO, FP, HOSTILE, KNOWN, make_run

from harness.reports.gathered import gather
from harness.reports.site import write_site

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: tox -e web")
CHROMIUM = shutil.which("chromium")
AXE = Path(os.environ.get("HARNESS_AXE", "axe.min.js"))
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine: tox -e web"),
    pytest.mark.timeout(600),
]
PATIENCE = 120_000  # milliseconds
WIDTHS = (1280, 390)


@dataclass
class Visit:
    """A page, and what went wrong on it or was asked of a network."""

    page: Any
    site: Path
    wrong: list[str] = field(default_factory=list)

    def open(self, path: str) -> Any:
        self.page.goto(f"file://{self.site}/{path}")
        if path.startswith("index.html"):
            self.page.wait_for_selector("body[data-ready]")
        return self.page

    def rows(self) -> list[str]:
        return list(self.page.locator("#board tbody tr td:first-child").all_inner_texts())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "site"
    write_site(gather([KNOWN, DEMO]), out)
    return out


@pytest.fixture
def visit(browser: Any, site: Path) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    made = Visit(page, site)
    page.on("console", lambda said: made.wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: made.wrong.append(str(error)))
    page.on("dialog", lambda dialog: (made.wrong.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else made.wrong.append(asked.url),
    )
    yield made
    page.close()
    assert made.wrong == []


def test_sort_by_mouse_and_by_keyboard(visit: Visit) -> None:
    page = visit.open("index.html")
    assert visit.rows() == ["fp", "rtn", "gptq", "rtn", "gptq"]
    page.locator("#board thead th", has_text="value").click()
    page.wait_for_selector("#board thead th[aria-sort=ascending]:has-text('value')")
    assert visit.rows() == ["fp", "gptq", "rtn", "gptq", "rtn"]
    page.locator("#board thead th", has_text="value").locator("[tabindex='0']").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#board thead th[aria-sort=descending]:has-text('value')")
    assert visit.rows() == ["rtn", "gptq", "rtn", "gptq", "fp"]


def test_filter(visit: Visit) -> None:
    page = visit.open("index.html")
    page.select_option("#method", "gptq")
    assert visit.rows() == ["gptq", "gptq"]
    page.select_option("#setting", "W4A8")
    assert visit.rows() == ["gptq"]
    page.select_option("#method", "")
    page.fill("#search", "rtn")
    assert visit.rows() == ["rtn"]
    page.fill("#search", "")
    page.select_option("#setting", "")
    page.check("#significant")
    assert visit.rows() == ["rtn", "gptq", "rtn", "gptq"]  # fp does not differ from itself


def test_hover_shows_the_cell_and_a_click_opens_it(visit: Visit) -> None:
    page = visit.open("index.html")
    place = page.locator("#plot .scatterlayer .points path").first
    place.hover(force=True)
    page.wait_for_selector("#plot .hoverlayer .hovertext")
    assert "rtn" in page.locator("#plot .hoverlayer").text_content()
    page.locator("#board tbody a").nth(2).click()
    page.wait_for_selector("h1:has-text('gptq W4A16g64')")
    assert "model.layers.0.self_attn.q_proj" in page.content()


def test_a_permalink_shows_the_same_again(visit: Visit) -> None:
    from playwright.sync_api import expect

    page = visit.open("index.html")
    page.select_option("#group", index=1)
    expect(page.locator("#task option")).to_have_count(2)
    page.select_option("#task", index=1)
    page.select_option("#method", "adadim")
    page.locator("#board thead th", has_text="value").click()
    page.wait_for_selector("#board thead th[aria-sort=ascending]:has-text('value')")
    before, address = visit.rows(), page.evaluate("location.hash")
    assert len(before) == 3
    page.goto("about:blank")
    visit.open("index.html" + address)
    assert visit.rows() == before
    assert page.input_value("#task") == "pydoc_kl:length=512:windows=2"
    page.wait_for_selector("#board thead th[aria-sort=ascending]:has-text('value')")


def copied(page: Any, button: str) -> str:
    """What a click puts on the clipboard: a stand-in, since that of a machine without a head may be nobody's."""
    page.evaluate("""() => { window.copied = null; Object.defineProperty(navigator, 'clipboard', {
        configurable: true, value: { writeText: async text => { window.copied = text; } } }); }""")
    page.click(button)
    page.wait_for_function("window.copied")
    return str(page.evaluate("window.copied"))


def test_what_is_shown_can_be_copied(visit: Visit) -> None:
    page = visit.open("index.html")
    page.select_option("#method", "gptq")
    rows = list(csv.DictReader(copied(page, "#copy-csv").splitlines()))
    assert [(row["method"], row["setting"], row["verdict"]) for row in rows] == [
        ("gptq", "W4A16g64", "worse"), ("gptq", "W4A8", "worse"),
    ]  # fmt: skip
    assert float(rows[0]["low"]) < float(rows[0]["value"]) < float(rows[0]["high"])
    assert copied(page, "#copy-link").endswith(page.evaluate("location.hash"))


def test_recovery_is_shown_of_accuracies(visit: Visit, tmp_path: Path) -> None:
    page = visit.open("index.html")
    assert page.locator("#board thead th", has_text="recovery").count() == 0  # of a perplexity it would say nothing
    numbers: list[tuple[Any, Any, str]] = [(FP, {"piqa": (0.8, 0.01)}, "ok"), (CELL, {"piqa": (0.6, 0.01)}, "ok")]
    write_site(gather([make_run(tmp_path / "run", numbers)]), tmp_path / "site")
    visit.site = tmp_path / "site"
    page = visit.open("index.html")
    assert page.locator("#board thead th", has_text="recovery").count() == 1
    assert page.locator("#board tbody tr:nth-child(2)", has_text="75.0 %").count() == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(visit: Visit, width: int) -> None:
    visit.page.set_viewport_size({"width": width, "height": 844})
    for path in pages_of_each_kind(visit.site):
        page = visit.open(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


@pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core: tox -e web")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_roles_are_accessible(visit: Visit, scheme: str) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    for path in pages_of_each_kind(visit.site):
        page = visit.open(path)
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'best-practice'], preload: false})")
        assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]] == [], (
            path
        )


def test_the_reader_chooses_light_or_dark(visit: Visit) -> None:
    page = visit.open("index.html")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_first_paint_of_a_large_leaderboard(visit: Visit, tmp_path: Path) -> None:
    """Ten thousand cells, a thousand a model: the page paints before its data are there."""
    tasks = {f"task{number}": (0.5 + number / 100, 0.01) for number in range(12)}
    cell = replace(CELL, tasks=tuple(tasks))
    rows = [(replace(FP, tasks=cell.tasks), tasks, "ok")]
    rows += [(replace(cell, options={"damp": number / 10_000}), tasks, "ok") for number in range(1000)]
    write_site(gather([make_run(tmp_path / "run", rows)]), tmp_path / "site")
    visit.site = tmp_path / "site"
    page = visit.open("index.html")
    assert page.locator("#board tbody tr").count() == 25
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 2000 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_hostile_names_run_nothing(visit: Visit, tmp_path: Path) -> None:
    rows = [(replace(CELL, method=name), {"piqa": (0.5, 0.01)}, "ok") for name in HOSTILE]
    write_site(gather([make_run(tmp_path / "run", [(FP, {"piqa": (0.6, 0.01)}, "ok"), *rows])]), tmp_path / "site")
    visit.site = tmp_path / "site"
    page = visit.open("index.html")
    assert "<script>alert(1)</script>" in visit.rows()
    rows = list(csv.reader(copied(page, "#copy-csv").splitlines()))
    assert len({len(row) for row in rows}) == 1
    assert not [value for row in rows for value in row if value.startswith(("=", "+", "@", "\t"))]
    assert {row[7] for row in rows[1:]} == {"", "-0.1"}  # the one minus is that of a difference, which is a number
    assert "'=cmd()" in {row[1] for row in rows}
    for place in page.locator("#plot .scatterlayer .points path").all():
        place.hover(force=True)
    assert page.locator("#board img, #plot img").count() == 0
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for path in sorted((tmp_path / "site/cell").iterdir()):
        visit.open(f"cell/{path.name}")


def pages_of_each_kind(site: Path) -> list[str]:
    kinds = ("cell/9798a40f2a8009cc-aab174da.html", "cell/b46c2ab5d6b4473a-aab174da.html")
    method = next(path.name for path in sorted((site / "method").glob("gptq-*.html")))
    return ["index.html", "methods.html", "data.html", f"method/{method}", *kinds]
