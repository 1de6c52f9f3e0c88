"""Some products of a compiled ``wna8`` against Python's own integers: ``python -I trial.py LIBRARY``, of the standard
library alone. Ends with 0 where all is right; a processor or system that refuses an instruction ends it otherwise.

Run in a process of its own before a library is used: an instruction that is refused ends the process.
"""

import ctypes
import random
import struct
import sys

OUTPUTS, INPUTS = 64, 128
TOKENS = (1, 33)  # few, which unpack in registers; so many that tiles take most of them, and leave one


def main(path: str) -> int:
    library = ctypes.CDLL(path)
    kinds = ((bits, tokens) for bits in (4, 8) if bits <= library.wna8_bits() for tokens in TOKENS)
    return 0 if all(right(library, bits, tokens) for bits, tokens in kinds) else 1


def right(library: ctypes.CDLL, bits: int, tokens: int) -> bool:
    """Whether the products of random numbers are what they should be."""
    draw = random.Random(0)
    codes = [[draw.randrange(2**bits) for _ in range(INPUTS)] for _ in range(OUTPUTS)]
    zeros = [draw.randrange(2**bits) for _ in range(OUTPUTS)]
    x = [[draw.randrange(-128, 128) for _ in range(INPUTS)] for _ in range(tokens)]
    x_zeros = [draw.randrange(-128, 128) for _ in range(tokens)]
    sums = [sum(row) - zero * INPUTS for row, zero in zip(codes, zeros, strict=True)]
    layer = struct.pack("<8q", int.from_bytes(b"WNA8", "little"), OUTPUTS, INPUTS, 1, INPUTS, bits, 0, 0)
    layer += in_quads(codes, bits) + struct.pack(f"<{OUTPUTS}f", *[1.0] * OUTPUTS)
    layer += struct.pack(f"<{2 * OUTPUTS}i", *sums, *zeros) + bytes(4 * OUTPUTS)
    found = (ctypes.c_float * (tokens * OUTPUTS))()
    count = ctypes.c_long
    end = library.wna8(
        layer, count(len(layer)), struct.pack(f"<{tokens * INPUTS}b", *[code for row in x for code in row]),
        count(INPUTS), struct.pack(f"<{tokens}f", *[1.0] * tokens), struct.pack(f"<{tokens}i", *x_zeros),
        struct.pack(f"<{tokens}i", *map(sum, x)), count(1), found, count(OUTPUTS), count(tokens), count(0), count(1),
    )  # fmt: skip
    exact = [
        sum((a - x_zero) * (b - zero) for a, b in zip(row, weights, strict=True))
        for row, x_zero in zip(x, x_zeros, strict=True)
        for weights, zero in zip(codes, zeros, strict=True)
    ]
    return end == 0 and list(found) == exact


def in_quads(codes: list[list[int]], bits: int) -> bytes:
    """Four inputs of an output beside each other, those of all outputs, and so on; of 4 bits two such in a byte."""
    quads = [bytes(code for row in codes for code in row[quad : quad + 4]) for quad in range(0, INPUTS, 4)]
    if bits == 8:
        return b"".join(quads)
    return b"".join(
        bytes(map(int.__or__, low, (code << 4 for code in high)))
        for low, high in zip(quads[::2], quads[1::2], strict=True)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
