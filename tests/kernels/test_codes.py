"""The PTX that unpacks codes does what its plain twin does: its very text, run by the definitions of its instructions.

Only this part of the kernels has no twin under the interpreter, so it is proven here, for every byte.
"""

import re

import pytest
import torch

from harness.kernels.gpu.codes import unpacking_ptx

MAGIC = {torch.float16: (0x6400, 1024), torch.bfloat16: (0x4300, 128)}


def run(text: str, word: int) -> list[int]:
    """The two output registers for one input register."""
    registers = {"$2": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for name, operands in re.findall(r"^(shr\.u32|prmt\.b32|lop3\.b32) (.*);$", text, flags=re.MULTILINE):
        target, *sources = operands.split(", ")
        a, b, *rest = map(value, sources)
        if name == "shr.u32":
            registers[target] = a >> b
        elif name == "prmt.b32":
            pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            registers[target] = int.from_bytes(bytes(pool[rest[0] >> (4 * i) & 7] for i in range(4)), "little")
        else:
            c, table = rest
            bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
            registers[target] = sum((table >> index & 1) << i for i, index in enumerate(bits))
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize("dtype", MAGIC)
@pytest.mark.parametrize(("bits", "strip"), [(4, 0), (4, 1), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_every_byte_is_unpacked(bits: int, strip: int, dtype: torch.dtype) -> None:
    number, base = MAGIC[dtype]
    text = unpacking_ptx(strip, bits, number)
    text = getattr(text, "value", text)
    assert len(re.findall(r"^\w+\.\w+ ", text, flags=re.MULTILINE)) == 5  # none that run() does not know
    for start in range(0, 256, 4):
        codes = [(byte >> (bits * strip)) % 2**bits ^ 1 << (bits - 1) for byte in range(start, start + 4)]
        word = int.from_bytes(bytes(range(start, start + 4)), "little")
        halves = [half for register in run(text, word) for half in (register & 0xFFFF, register >> 16)]
        values = torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(dtype)
        assert values.tolist() == [base + code for code in codes]
