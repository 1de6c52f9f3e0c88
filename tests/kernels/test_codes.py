"""The PTX that unpacks codes does what its plain twin does: its very text, run by the definitions of its instructions.

Only this part of the kernels has no twin under the interpreter, so it is proven here, for every word; and that it is
this text which the compiled kernels hold.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from harness.kernels.gpu.codes import raising_ptx, unpacking_ptx

MAGIC = {torch.float16: (0x6400, 1024), torch.bfloat16: (0x4300, 128)}


def run(text: str, words: torch.Tensor) -> torch.Tensor:
    """The output register for each input register."""
    registers = {"$1": words}

    for name, operands in re.findall(r"^(shr\.u32|shl\.b32|and\.b32|lop3\.b32) (.*);$", text, flags=re.MULTILINE):
        target, *sources = operands.split(", ")
        a, b, *rest = (registers[operand] if operand in registers else int(operand, 0) for operand in sources)
        if name == "shr.u32":
            registers[target] = a >> b
        elif name == "shl.b32":
            registers[target] = a << b & 0xFFFFFFFF
        elif name == "and.b32":
            registers[target] = a & b
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


@pytest.mark.parametrize(("bits", "strip"), [(4, 0), (4, 1), *((2, strip) for strip in range(4))])
def test_every_byte_is_raised(bits: int, strip: int) -> None:
    """To the signed code times 2^(8 − bits), whatever its neighbours in the register are."""
    text = raising_ptx(strip, bits)
    text = getattr(text, "value", text)
    assert len(re.findall(r"^\w+\.\w+ ", text, flags=re.MULTILINE)) == 2
    byte = torch.arange(256)
    packed = [byte, byte.flip(0), byte.roll(85), (byte * 37) % 256]
    out = run(text, sum(each << 8 * place for place, each in enumerate(packed)))
    for place, each in enumerate(packed):
        field = (each >> (bits * strip)) % 2**bits
        signed = field - (field >> (bits - 1) << bits)  # two's complement
        raised = (out >> 8 * place & 0xFF).to(torch.uint8).view(torch.int8)
        assert torch.equal(raised.long(), signed << (8 - bits))


_TRANSLATED = r"""
import json, re
from harness.kernels.aot import translated, variants
names = ("wna16 w4 fp16 oc 16x64", "wna16 w4 bf16 oc 16x64", "wna16 w2 fp16 oc 16x64", "wna16_gemv w4 fp16 oc 1x16",
         "wna8 w4 channel 16x64", "wna8 w2 channel 16x64")
for variant in variants("sm_89"):
    if variant.name in names:
        ir = translated(variant, "sm_89").asm["ttir"]
        calls = re.findall(r'elementwise_inline_asm "(.*?)".* -> tensor<\d+x\d+x(\w+)>', ir)
        print(json.dumps([variant.name, calls]))
"""


@pytest.mark.timeout(300)
def test_compiled_kernels_hold_the_text_that_is_proven() -> None:
    """Every strip once, with the constants of the type that it becomes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _TRANSLATED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = dict(map(json.loads, done.stdout.splitlines()))
    assert len(kernels) == 6
    for name, calls in kernels.items():
        bits = 2 if " w2 " in name else 4
        if name.startswith("wna8"):
            proven, becomes = [raising_ptx(strip, bits) for strip in range(8 // bits)], "i8"
        else:
            dtype, becomes = (torch.bfloat16, "bf16") if "bf16" in name else (torch.float16, "f16")
            proven = [unpacking_ptx(strip, bits, MAGIC[dtype][0]) for strip in range(16 // bits)]
        found = [(text.replace(r"\0A", "\n"), to) for text, to in calls]
        assert found == [(getattr(text, "value", text), becomes) for text in proven], name
