"""``harness bench --static``: every shipped configuration compiled for every target, held against what it must be.

What can be known without a GPU: that it compiles, what it takes of the machine, which matrix instruction it came to,
how many instructions surround it. How fast it is, cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import atomic, provenance
from harness.kernels.aot import Variant, compiled, variants
from harness.kernels.configs import TARGETS
from harness.kernels.sass import Binary

RATCHET = Path(__file__).resolve().parent / "ratchet.json"
# Instructions of the main loop of the 4-bit integer product with 128 × 128 blocks, 64 products of 16 × 8 × 32 a warp.
_MOST_INSTRUCTIONS = {"sm_80": 185, "sm_86": 185, "sm_89": 185, "sm_90": 125, "sm_100": 155, "sm_120": 175}
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# By family: Ampere to Ada and consumer Blackwell; Hopper; datacenter Blackwell; CDNA3.
_MATRIX = {
    "wna16": {"sm_90": "HGMMA", "sm_100": "UTCHMMA|HMMA", "gfx942": "v_mfma_f32_.*(f16|bf16)", "": "HMMA"},
    "wna8": {"sm_90": "IGMMA", "sm_100": "UTCIMMA|IMMA", "gfx942": "v_mfma_i32", "": "IMMA"},
    "rotate_quantize": {"sm_90": "H(G)?MMA", "sm_100": "UTCHMMA|HMMA", "gfx942": "v_mfma_f32", "": "HMMA"},
    "rotate_permute": {"sm_90": "H(G)?MMA", "sm_100": "UTCHMMA|HMMA", "gfx942": "v_mfma_f32", "": "HMMA"},
}
_CONVERSIONS = ("I2F", "I2FP", "I2HP")


@dataclass(frozen=True)
class Row:
    """One kernel on one target, and what is wrong with it."""

    variant: Variant
    target: str
    binary: Binary
    faults: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.variant.name} {self.target}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON and tables."""
        binary, loop = self.binary, self.binary.loop
        return {
            "kernel": self.variant.name, "target": self.target, "registers": binary.registers,
            "stack_bytes": binary.stack_bytes, "local_accesses": binary.local_accesses,
            "shared_bytes": binary.shared_bytes, "matrix_instruction": " ".join(binary.matrix_opcodes) or None,
            "copy_bytes": {str(width): count for width, count in sorted(binary.copy_bytes.items())},
            "loop_instructions": loop.instructions if loop else None,
            "loop_matrix_instructions": loop.matrix_instructions if loop else None,
            "loop_conversions": loop.count(*_CONVERSIONS) if loop else None, "faults": list(self.faults),
        }  # fmt: skip


def examine(
    targets: Iterable[str] = TARGETS,
    wanted: Callable[[Variant], bool] = lambda variant: True,
    ratchet: Mapping[str, int] | None = None,
) -> Iterator[Row]:
    """Compile and check, target by target. ``ratchet``: loop instructions that may not be exceeded."""
    for target in targets:
        for variant in filter(wanted, variants(target)):
            binary = compiled(variant, target)
            yield Row(variant, target, binary, tuple(_faults(variant, target, binary, ratchet or {})))


def read_ratchet() -> dict[str, int]:
    """Loop instructions on record; empty where another version of Triton is installed than they were taken with."""
    if not RATCHET.is_file():
        return {}
    content = json.loads(RATCHET.read_text())
    return dict(content["loop_instructions"]) if content["triton"] == provenance.version("triton") else {}


def tightened(old: Mapping[str, int], rows: Iterable[Row]) -> dict[str, int]:
    """The record with what fell; nothing in it ever rises. What is no longer shipped leaves it."""
    shipped = {f"{variant.name} {target}" for target in TARGETS for variant in variants(target)}
    new = {name: count for name, count in old.items() if name in shipped}
    for row in rows:
        if row.binary.loop is not None and row.binary.loop.matrix_instructions:
            new[row.key] = min(row.binary.loop.instructions, old.get(row.key, row.binary.loop.instructions))
    return dict(sorted(new.items()))


def write_ratchet(record: Mapping[str, int]) -> None:
    """Replace the record."""
    atomic.write_json(RATCHET, {"triton": provenance.version("triton"), "loop_instructions": dict(record)})


def _faults(variant: Variant, target: str, binary: Binary, ratchet: Mapping[str, int]) -> Iterator[str]:
    if binary.stack_bytes or binary.local_accesses:
        yield f"spills: {binary.stack_bytes} bytes of stack, {binary.local_accesses} local accesses"
    if binary.shared_bytes > _SHARED_KIB[target] * 1024:
        yield f"{binary.shared_bytes} bytes of shared memory, {target} has {_SHARED_KIB[target]} KiB"
    expected = _MATRIX.get(variant.of)
    if expected is not None:
        pattern = expected.get(target, expected[""])
        if not any(re.match(pattern, opcode) for opcode in binary.matrix_opcodes):
            yield f"matrix instruction {' '.join(binary.matrix_opcodes) or 'none'}, not {pattern}"
    loop, on_amd = binary.loop, target.startswith("gfx")
    if variant.of in ("wna16", "wna8") and not on_amd:
        if loop is None:
            yield "no loop around the matrix instructions"
        if not binary.copy_bytes:
            yield "nothing is copied to shared memory asynchronously"
    if loop is None:
        return
    if variant.of in ("wna16", "wna16_gemv") and loop.count(*_CONVERSIONS):
        yield f"{loop.count(*_CONVERSIONS)} conversions from integers in the loop"
    if variant.of in ("wna16", "wna8") and (narrow := set(binary.copy_bytes) - {16}):
        yield f"copies of {', '.join(map(str, sorted(narrow)))} bytes to shared memory"
    most = _MOST_INSTRUCTIONS.get(target) if variant.name == "wna8 w4 channel 128x128" else None
    if most is not None and loop.instructions > most:
        yield f"{loop.instructions} instructions in the loop, at most {most}"
    recorded = ratchet.get(f"{variant.name} {target}")
    if recorded is not None and loop.instructions > recorded:
        yield f"{loop.instructions} instructions in the loop, {recorded} on record"
