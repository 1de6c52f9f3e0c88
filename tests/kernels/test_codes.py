"""The PTX that unpacks codes does what its plain twin does: its very text, run by the definitions of its instructions.

Only this part of the kernels has no twin under the interpreter, so it is proven here, for every word.
"""

import re

import pytest
import torch

from harness.kernels.gpu.codes import unpacking_ptx

MAGIC = {torch.float16: (0x6400, 1024), torch.bfloat16: (0x4300, 128)}


def run(text: str, words: torch.Tensor) -> torch.Tensor:
    """The output register for each input register."""
    registers = {"$1": words}

    for name, operands in re.findall(r"^(shr\.u32|lop3\.b32) (.*);$", text, flags=re.MULTILINE):
        target, *sources = operands.split(", ")
        a, b, *rest = (registers[operand] if operand in registers else int(operand, 0) for operand in sources)
        if name == "shr.u32":
            registers[target] = a >> b
        else:
            c, table = rest
            terms = [
                (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1
            ]
            registers[target] = sum(terms, torch.zeros_like(words)) & 0xFFFFFFFF  # no two terms share a bit
    return registers["$0"]


@pytest.mark.parametrize("dtype", MAGIC)
@pytest.mark.parametrize(("bits", "strip"), [*((4, strip) for strip in range(4)), *((2, strip) for strip in range(8))])
def test_every_word_is_unpacked(bits: int, strip: int, dtype: torch.dtype) -> None:
    number, base = MAGIC[dtype]
    text = unpacking_ptx(strip, bits, number)
    text = getattr(text, "value", text)
    assert len(re.findall(r"^\w+\.\w+ ", text, flags=re.MULTILINE)) == 2  # none that run() does not know
    low = torch.arange(1 << 16)
    high = low.flip(0)
    out = run(text, high << 16 | low)
    for half, word in ((out & 0xFFFF, low), (out >> 16, high)):
        values = half.to(torch.int32).to(torch.int16).view(dtype)
        codes = (word >> (bits * strip)) % 2**bits ^ 1 << (bits - 1)
        assert torch.equal(values.long(), base + codes)
