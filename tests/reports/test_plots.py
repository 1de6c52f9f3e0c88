"""Plots of real results: which are drawn, and that the same data make the same bytes."""

from __future__ import annotations

from pathlib import Path

from made_runs import DUQUANT, KNOWN

from harness.reports.gathered import gather
from harness.reports.plots import draw


def test_what_a_run_has_data_for_is_drawn(tmp_path: Path) -> None:
    drawn = dict(draw(gather([KNOWN]), tmp_path))
    assert set(drawn) == {"bits-1.svg", "layers-W4A16g64.svg", "layers-W4A8.svg", "costs.svg"}
    for name in drawn:
        assert (tmp_path / name).read_text().startswith("<?xml")
        assert (tmp_path / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "wikitext2:windows=16" in (tmp_path / "bits-1.svg").read_text()


def test_outliers_are_drawn_of_a_method_that_transforms_and_twice_alike(tmp_path: Path) -> None:
    drawn = [dict(draw(gather([DUQUANT]), tmp_path / name)) for name in ("one", "two")]
    assert sum(name.startswith("outliers-") for name in drawn[0]) == 2
    for name in drawn[0]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
