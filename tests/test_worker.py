"""How a worker names what went wrong. The work itself is tested with real processes in test_supervisor."""

from __future__ import annotations

import errno

import pytest
import torch

from harness.errors import BadOutput, HarnessError, Infrastructure, Unsupported
from harness.worker import Timings, how_it_ended


def raiser(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unsupported("W2A16 is not for me"), "unsupported", "W2A16 is not for me"),
        (BadOutput("NaN in layers.0"), "bad_output", "NaN in layers.0"),
        (Infrastructure("the link is cut", fix="mend it"), "infra", "the link is cut"),
        (HarnessError("no such split", fix="choose another"), "error", "no such split"),
        (MemoryError(), "oom_host", "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom_gpu", "torch.OutOfMemoryError: CUDA out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "infra", "OSError: [Errno 28] No space left on device"),
        (OSError(errno.ENOENT, "No such file"), "error", "FileNotFoundError: [Errno 2] No such file"),
        (ValueError("first line\nsecond line"), "error", "ValueError: first line"),
        (SystemExit(3), "error", "SystemExit: 3"),
        (KeyboardInterrupt(), "error", "KeyboardInterrupt"),
    ],
)
def test_every_exception_has_a_status(error: BaseException, status: str, reason: str) -> None:
    assert how_it_ended(raiser(error)) == (status, reason)


def test_torch_that_cannot_allocate_is_out_of_memory() -> None:
    def work() -> None:
        torch.empty(2**62, dtype=torch.uint8)

    assert how_it_ended(work)[0] == "oom_host"


def test_the_traceback_is_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    how_it_ended(raiser(ValueError("why")))
    assert "in work" in capsys.readouterr().err


def test_work_that_ends_well_is_ok() -> None:
    assert how_it_ended(lambda: None) == ("ok", None)


def test_time_of_a_part_that_fails_is_kept() -> None:
    timings = Timings()
    with pytest.raises(ValueError, match="x"), timings.timing("load"):
        raise ValueError("x")
    assert timings.seconds["load_seconds"] is not None
    assert timings.seconds["quantize_seconds"] is None
