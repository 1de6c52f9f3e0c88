"""Finished cells as checkpoints that other programs load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.errors import HarnessError

FORMATS = ("native", "gptq", "compressed-tensors")


def export(cell: Path, format: str, to: Path) -> Path:
    """Write the cell at ``cell`` (its folder, or its artifact) as a checkpoint folder ``to``, and return that.

    Raises HarnessError where there is no finished cell or ``to`` is there already, Unsupported with all that the format
    cannot carry, before anything is written.
    """
    from harness.export import compressed_tensors, gptq, native
    from harness.export.checkpoint import Finished, read_finished

    writers: dict[str, Callable[[Finished, Path], None]] = {
        "native": native.write, "gptq": gptq.write, "compressed-tensors": compressed_tensors.write,
    }  # fmt: skip
    if format not in writers:
        raise HarnessError(f"format {format!r} is not offered", fix=f"choose from {', '.join(FORMATS)}")
    if to.exists():
        raise HarnessError(f"{to} is there already", fix="choose another --to, or move it away")
    writers[format](read_finished(cell), to)
    return to
