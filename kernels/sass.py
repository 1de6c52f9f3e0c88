"""What is in a compiled GPU kernel, read from its disassembly: resources, matrix instructions, the main loop."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class Loop:
    """The innermost loop that holds most matrix instructions: its instructions by opcode, without modifiers."""

    opcodes: Mapping[str, int]
    matrix_instructions: int
    products: float = 0.0
    """Its products of 16 × 8 outputs over 32 bytes of inputs, a warp's share, whatever the instruction's own shape."""

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, *prefixes: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefixes))


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. ``copy_bytes``: asynchronous copies to shared memory by width. ``loop``: None on AMD."""

    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    matrix_opcodes: tuple[str, ...]
    copy_bytes: Mapping[int, int]
    loop: Loop | None
    whole: Loop | None = None
    """All of the kernel, counted like its loop."""


def read_nvidia(cubin: bytes, ptx: str, shared_bytes: int, cuobjdump: Path) -> Binary:
    """Disassemble with the tool that Triton brings along. ``shared_bytes``: what is asked for at launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (_tool(cuobjdump, flag, file.name) for flag in ("-res-usage", "-sass"))
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in _INSTRUCTION.findall(sass)]
    opcodes = Counter(opcode for _, opcode, _ in instructions)
    return Binary(
        registers=found["REG"],
        stack_bytes=found["STACK"] + found["LOCAL"],
        local_accesses=sum(count for opcode, count in opcodes.items() if opcode.startswith(_LOCAL)),
        shared_bytes=shared_bytes,
        matrix_opcodes=tuple(sorted(opcode for opcode in opcodes if _multiplies(opcode))),
        copy_bytes=Counter(int(width, 0) for width in _COPY.findall(ptx)),
        loop=_main_loop(instructions),
        whole=_counted(instructions),
    )


def read_amd(assembly: str, shared_bytes: int) -> Binary:
    """From the assembly text, which carries the resources as metadata."""
    spilled = sum(_number(assembly, name) for name in (".vgpr_spill_count", ".sgpr_spill_count"))
    return Binary(
        registers=_number(assembly, ".vgpr_count"),
        stack_bytes=_number(assembly, ".private_segment_fixed_size"),
        local_accesses=spilled,
        shared_bytes=shared_bytes,
        matrix_opcodes=tuple(sorted(set(re.findall(r"\bv_mfma_\w+", assembly)))),
        copy_bytes={},
        loop=None,
    )


def _main_loop(instructions: Sequence[tuple[int, str, str]]) -> Loop | None:
    """Of all backward branches the one over most matrix instructions; over fewest others where they are equal."""
    index = {address: i for i, (address, _, _) in enumerate(instructions)}
    best: Loop | None = None
    for i, (address, opcode, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address or int(target[1], 16) not in index:
            continue
        loop = _counted(instructions[index[int(target[1], 16)] : i + 1])
        if best is None or (loop.matrix_instructions, -loop.instructions) > (
            best.matrix_instructions,
            -best.instructions,
        ):
            best = loop
    return best


def _counted(instructions: Sequence[tuple[int, str, str]]) -> Loop:
    opcodes = Counter(opcode for _, opcode, _ in instructions)
    matrix = {opcode: count for opcode, count in opcodes.items() if _multiplies(opcode)}
    return Loop(opcodes, sum(matrix.values()), sum(count * _products(opcode) for opcode, count in matrix.items()))


def _multiplies(opcode: str) -> bool:
    """Whether it is a matrix instruction; HFMA2.MMA, a plain multiply-add of pairs, is none."""
    return "MMA" in opcode and not opcode.startswith("HFMA2")


def _products(opcode: str) -> float:
    """How much one instruction multiplies: HMMA.16816 and IMMA.16832 are 1; HGMMA.64x128x16 is that of four warps.

    Not a number for those that do not say: tcgen05's shape is in a descriptor.
    """
    if (group := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)) is not None:
        m, n, k = map(int, group.groups())
        return m * n * k / 4 / (16 * 8 * (32 if opcode.startswith("I") else 16))
    sizes = {"HMMA.16816": 1.0, "HMMA.1688": 0.5, "IMMA.16832": 1.0, "IMMA.16816": 0.5}
    return next((size for name, size in sizes.items() if opcode.startswith(name)), math.nan)


def _number(assembly: str, name: str) -> int:
    return int(re.findall(rf"{re.escape(name)}:?\s+(\d+)", assembly)[-1])


def _tool(tool: Path, flag: str, file: str) -> str:
    return subprocess.run([str(tool), flag, file], capture_output=True, text=True, check=True).stdout
