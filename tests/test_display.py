"""What a run shows while it goes on."""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import Progress, TextColumn

from harness.display import LiveWatcher, PlainWatcher
from harness.supervisor import Watcher


def play(watcher: Watcher) -> None:
    watcher.started("prepare", "preparing")
    watcher.progress("prepare", "fetch", 1, 3, "wheel")
    watcher.ended("prepare", "preparing", "ok", None, 1.0)
    watcher.due(2)
    watcher.started("a", "tiny W4A8 rtn")
    watcher.progress("a", "quantize", 1, 2, "[red]layers.0")
    watcher.started("b", "tiny W4A8 [bold]")
    watcher.ended("b", "tiny W4A8 [bold]", "error", "ValueError: [/] broken", 2.5)


def test_plain_lines_count_the_cells_that_ended() -> None:
    stream = io.StringIO()
    play(PlainWatcher(stream))
    assert stream.getvalue().splitlines() == [
        "start preparing",
        "ok preparing (1.0 s)",
        "start tiny W4A8 rtn",
        "start tiny W4A8 [bold]",
        "[1/2] error tiny W4A8 [bold] (2.5 s): ValueError: [/] broken",
    ]


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_left_does_not_stop_the_run() -> None:
    play(PlainWatcher(Gone()))


def test_bars_show_stage_and_detail_and_take_no_markup_from_names() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    columns = [TextColumn("{task.description} {task.fields[stage]} {task.completed} {task.fields[detail]}")]
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        play(LiveWatcher(progress))
        progress.refresh()
    shown = console.file.getvalue()
    for part in (
        "all cells",
        "tiny W4A8 rtn quantize 1 [red]layers.0",
        "error tiny W4A8 [bold] 2.5 s: ValueError: [/] broken",
    ):
        assert part in shown
