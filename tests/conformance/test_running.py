"""A method that takes its process down is told by what it was being asked, and how the process ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.conformance.running import check_methods
from harness.limits import Limits

BROKEN = Path(__file__).parents[1] / "broken_methods"


@pytest.mark.parametrize(
    ("method", "limits", "words"),
    [
        ("hangs", Limits(timeout_seconds=40, grace_seconds=1), "timeout: stopped after"),
        ("segfaults", Limits(), "crashed: killed by SIGSEGV"),
        ("leaves", Limits(), "crashed: the process left with exit code 0"),
        ("eats_memory", Limits(memory_bytes=2_000_000_000), "oom_host: stopped at"),
        ("raises_at_import", Limits(), "broken on purpose at import"),
    ],
)
def test_an_end_of_the_process_is_a_finding(method: str, limits: Limits, words: str) -> None:
    (verdict,) = check_methods([str(BROKEN / f"{method}.py")], limits=limits)
    failed = [row for row in verdict.rows if row["state"] == "failed"]
    assert not verdict.passed
    assert words in failed[-1]["message"]
