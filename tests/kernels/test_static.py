"""Every shipped kernel compiled for every target, and what is read from compiled kernels."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from harness.kernels.aot import Variant, variants
from harness.kernels.configs import TARGETS
from harness.kernels.sass import Binary, Loop, _main_loop
from harness.kernels.static import Row, _faults, read_ratchet, tightened

_COMPILED = """
import json, sys
from harness.kernels.static import examine, read_ratchet
print(json.dumps([row.as_dict() for row in examine([sys.argv[1]], ratchet=read_ratchet())]))
"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.timeout(900)
def test_every_shipped_kernel_compiles_without_faults(target: str) -> None:
    """In a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _COMPILED, target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["kernel"] for row in rows] == [variant.name for variant in variants(target)]
    assert [(row["kernel"], row["faults"]) for row in rows if row["faults"]] == []


def variant(name: str = "wna8 w4 channel 128x128", of: str = "wna8") -> Variant:
    return Variant(name, of, {"GROUP": 0, "BITS": 4, "BM": 128}, {"num_warps": 8})


def binary(instructions: int = 170, **changes) -> Binary:
    loop = Loop(Counter({"IMMA.16832": 64, "LOP3": instructions - 64}), 64)
    parts = {
        "registers": 170, "stack_bytes": 0, "local_accesses": 0, "shared_bytes": 49152,
        "matrix_opcodes": ("IMMA.16832",), "copy_bytes": {16: 18}, "loop": loop,
    }  # fmt: skip
    return Binary(**parts | changes)


def test_a_sound_kernel_has_no_faults() -> None:
    assert list(_faults(variant(), "sm_89", binary(), {})) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stack_bytes": 8}, "spills"),
        ({"local_accesses": 2}, "spills"),
        ({"shared_bytes": 100 * 1024}, "shared memory"),
        ({"matrix_opcodes": ("HMMA.16816",)}, "not IMMA"),
        ({"matrix_opcodes": ()}, "none"),
        ({"copy_bytes": {16: 10, 8: 8}}, "copies of 8 bytes"),
        ({"instructions": 186}, "at most 185"),
        ({"copy_bytes": {}}, "asynchronously"),
        ({"loop": None}, "no loop"),
    ],
)
def test_faults_are_found(changes, word: str) -> None:
    (fault,) = _faults(variant(), "sm_89", binary(**changes), {})
    assert word in fault


def test_conversions_count_in_weight_only_loops() -> None:
    loop = Loop(Counter({"HMMA": 8, "I2F.F16": 2}), 8)
    (fault,) = _faults(variant("a", "wna16"), "sm_89", binary(loop=loop, matrix_opcodes=("HMMA",)), {})
    assert "2 conversions" in fault


@pytest.mark.parametrize(("of", "opcode"), [("wna16", "HMMA"), ("wna8", "IMMA")])
def test_copies_are_16_bytes_for_16_tokens_too(of: str, opcode: str) -> None:
    few = Variant("a", of, {"GROUP": 64, "BITS": 4, "BM": 16}, {"num_warps": 4})
    made = {"loop": Loop(Counter({opcode: 8}), 8), "matrix_opcodes": (opcode,)}
    (fault,) = _faults(few, "sm_89", binary(copy_bytes={16: 8, 8: 16}, **made), {})
    assert "copies of 8 bytes" in fault
    assert list(_faults(few, "sm_89", binary(**made), {})) == []


def test_the_record_only_falls() -> None:
    key = "wna8 w4 channel 128x128 sm_89"
    row = Row(variant(), "sm_89", binary(175), ())
    (fault,) = _faults(variant(), "sm_89", binary(175), {key: 174})
    assert "174 on record" in fault
    assert tightened({key: 174}, [row]) == {key: 174}
    assert tightened({key: 179}, [row]) == {key: 175}
    assert tightened({}, [row]) == {key: 175}


def test_the_record_holds_the_kernels_of_this_triton() -> None:
    assert all(count > 0 for count in read_ratchet().values())
    assert any(name.startswith("wna8 w4 channel 128x128") for name in read_ratchet())


def test_main_loop_is_the_one_with_most_matrix_instructions() -> None:
    instructions = [
        (0x00, "MOV", ""), (0x10, "LDS", ""), (0x20, "BRA", " `(0x10)"), (0x30, "IMMA.16832", ""), (0x40, "LOP3", ""),
        (0x50, "IMMA.16832", ""), (0x60, "BRA", " 0x30"), (0x70, "IMMA.16832", ""), (0x80, "BRA", " 0x90"),
    ]  # fmt: skip
    loop = _main_loop(instructions)
    assert loop is not None
    assert (loop.matrix_instructions, loop.instructions, loop.count("LOP")) == (2, 4, 1)


@pytest.mark.parametrize(
    ("opcode", "products"),
    [("HMMA.16816.F32", 1), ("IMMA.16832.S8.S8.SAT", 1), ("HMMA.1688.F32", 0.5), ("HGMMA.64x16x16.F32", 2),
     ("IGMMA.64x128x32.S8.S8", 16)],
)  # fmt: skip
def test_matrix_instructions_are_counted_by_what_they_multiply(opcode: str, products: float) -> None:
    """A warp's share: 64 × 16 × 16 by four warps is two products of 16 × 8 × 16 for each."""
    loop = _main_loop([(0x00, opcode, ""), (0x10, "LOP3", ""), (0x20, "BRA", " 0x0")])
    assert loop is not None and loop.products == products


def test_what_is_no_longer_shipped_leaves_the_record() -> None:
    assert tightened({"a kernel of before sm_89": 3}, []) == {}
