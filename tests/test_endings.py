"""Every way in which a process can end has one name."""

from __future__ import annotations

import signal

import pytest

from harness.endings import STATUSES, Ending, Lost, classify, resumes


def ending(returncode: int, **changes: object) -> Ending:
    return Ending(
        **{"returncode": returncode, "stopped": None, "kernel_oom": False, "peak_bytes": 5, "seconds": 1.0, **changes}
    )


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (ending(0), "crashed"),
        (ending(3), "crashed"),
        (ending(-signal.SIGSEGV), "crashed"),
        (ending(-signal.SIGKILL), "crashed"),
        (ending(-signal.SIGKILL, kernel_oom=True), "oom_host"),
        (ending(-signal.SIGSEGV, kernel_oom=True), "crashed"),
        (ending(-signal.SIGKILL, stopped="memory"), "oom_host"),
        (ending(-signal.SIGKILL, stopped="timeout", kernel_oom=True), "timeout"),
        (ending(-signal.SIGTERM, stopped="timeout"), "timeout"),
        (ending(0, stopped="timeout"), "timeout"),
        (ending(-signal.SIGTERM, stopped="interrupt"), "interrupted"),
        (Lost("the machine went away", 1.0), "infra"),
    ],
)
def test_ends_without_last_words(how: Ending | Lost, status: str) -> None:
    found, reason = classify(how, None)
    assert found == status in STATUSES
    assert reason


def test_last_words_are_believed_even_of_a_worker_that_was_stopped_while_it_left() -> None:
    said = {"status": "ok", "reason": None}
    assert classify(ending(-signal.SIGTERM, stopped="interrupt"), said) == ("ok", None)
    assert classify(ending(-signal.SIGSEGV), said) == ("ok", None)


def test_only_what_the_machine_did_is_run_again_unasked() -> None:
    again = {status for status in STATUSES if resumes(status, 0)}
    assert again == {"interrupted", "infra"}
    assert resumes("crashed", -signal.SIGKILL)
    assert not resumes("crashed", -signal.SIGSEGV)
    assert not resumes("oom_host", -signal.SIGKILL)
