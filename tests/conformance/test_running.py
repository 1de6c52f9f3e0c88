"""A method that takes its process down is told by what it was being asked, and how the process ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from harness.conformance.running import check_methods
from harness.limits import Limits
from harness.pool import Interrupted

BROKEN = Path(__file__).parents[1] / "broken_methods"
ENDS = {
    "segfaults": "crashed: killed by SIGSEGV",
    "leaves": "crashed: the process left with exit code 0",
    "raises_at_import": "broken on purpose at import",
}


def path(name: str) -> str:
    return str(BROKEN / f"{name}.py")


def test_an_end_of_one_process_is_that_methods_finding() -> None:
    verdicts = {verdict.method: verdict for verdict in check_methods([*map(path, ENDS)], limits=Limits(jobs=2))}
    assert len(verdicts) == len(ENDS)
    for name, words in ENDS.items():
        (failed,) = (row for row in verdicts[path(name)].rows if row["state"] == "failed")
        assert words in failed["message"]
        assert not verdicts[path(name)].passed


@pytest.mark.parametrize(
    ("method", "limits", "words"),
    [
        ("hangs", Limits(timeout_seconds=40, grace_seconds=1), "timeout: stopped after"),
        ("eats_memory", Limits(memory_bytes=2_000_000_000), "oom_host: stopped at"),
    ],
)
def test_what_reaches_a_limit_is_stopped(method: str, limits: Limits, words: str) -> None:
    (verdict,) = check_methods([path(method)], limits=limits)
    assert words in verdict.rows[-1]["message"]
    assert not verdict.passed


def test_a_signal_ends_it() -> None:
    with pytest.raises(Interrupted) as stopped:
        list(check_methods([path("hangs")], on_event=lambda method, event: signal.raise_signal(signal.SIGINT)))
    assert stopped.value.signal == signal.SIGINT
