"""How a worker names what went wrong. The work itself is tested with real processes in test_supervisor."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import CELL

from harness.checkpoint import open_checkpoint
from harness.errors import BadOutput, HarnessError, Infrastructure, Unsupported
from harness.events import Events
from harness.placement import IN_MEMORY
from harness.registry import describe_methods, find_method
from harness.runfolder import CellFolder
from harness.worker import Job, Timings, how_it_ended

BROKEN = Path(__file__).parent / "broken_methods"


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


@pytest.mark.fault(12, 19)
@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("raises_at_import", "error", "RuntimeError: broken on purpose at import"),
        ("raises_when_made", "error", "TypeError: broken on purpose when made"),
        ("raises", "error", "ValueError: broken on purpose"),
        ("supports_nothing", "unsupported", "W4A16g64 is not for me"),
        ("returns_nan", "bad_output", "scale"),
    ],
)
def test_every_broken_method_ends_by_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: str, reason: str
) -> None:
    monkeypatch.setattr("harness.worker.make_deterministic", lambda threads, seed: None)  # that stays for other tests
    source = str(BROKEN / f"{name}.py")
    cell = replace(
        CELL, method=name, method_source=source, method_sha256=find_method(source, describe_methods()).sha256,
        model_path=str(tiny_folder), weights_sha256=open_checkpoint(tiny_folder).sha256(), setting="W4A16g64",
    )  # fmt: skip
    job = Job(cell, CellFolder(tmp_path), 1, IN_MEMORY, Events(None), Timings())
    named, why = how_it_ended(job.run)
    assert named == status
    assert reason in (why or "")
    assert not any(tmp_path.glob("quantized*"))


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
