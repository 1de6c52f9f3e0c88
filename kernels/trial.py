"""One product of a compiled ``wna8`` against Python's own integers: ``python -I trial.py LIBRARY``, of the standard
library alone. Ends with 0 where all is right; a processor or system that refuses an instruction ends it otherwise.

Run in a process of its own before a library is used: an instruction that is refused ends the process.
"""

import ctypes
import random
import struct
import sys

OUTPUTS, INPUTS, TOKENS, BITS = 64, 128, 33, 4  # tokens: so many that tiles take most of them, and leave one


def main(path: str) -> int:
    draw = random.Random(0)
    codes = [[draw.randrange(16) for _ in range(INPUTS)] for _ in range(OUTPUTS)]
    zeros = [draw.randrange(16) for _ in range(OUTPUTS)]
    x = [[draw.randrange(-128, 128) for _ in range(INPUTS)] for _ in range(TOKENS)]
    x_zeros = [draw.randrange(-128, 128) for _ in range(TOKENS)]
    sums = [sum(row) - zero * INPUTS for row, zero in zip(codes, zeros, strict=True)]
    lines = [
        codes[o][quad + i] | codes[o][quad + 4 + i] << 4
        for quad in range(0, INPUTS, 8)
        for o in range(OUTPUTS)
        for i in range(4)
    ]
    layer = struct.pack("<8q", int.from_bytes(b"WNA8", "little"), OUTPUTS, INPUTS, 1, INPUTS, BITS, 0, 0)
    layer += bytes(lines) + struct.pack(f"<{OUTPUTS}f", *[1.0] * OUTPUTS)
    layer += struct.pack(f"<{2 * OUTPUTS}i", *sums, *zeros) + bytes(4 * OUTPUTS)
    found = (ctypes.c_float * (TOKENS * OUTPUTS))()
    function, count = ctypes.CDLL(path).wna8, ctypes.c_long
    end = function(
        layer, count(len(layer)), struct.pack(f"<{TOKENS * INPUTS}b", *[code for row in x for code in row]),
        count(INPUTS), struct.pack(f"<{TOKENS}f", *[1.0] * TOKENS), struct.pack(f"<{TOKENS}i", *x_zeros),
        struct.pack(f"<{TOKENS}i", *map(sum, x)), count(1), found, count(OUTPUTS), count(TOKENS), count(0), count(1),
    )  # fmt: skip
    if end != 0:
        return 1
    right = [
        sum((a - x_zero) * (b - zero) for a, b in zip(row, weights, strict=True))
        for row, x_zero in zip(x, x_zeros, strict=True)
        for weights, zero in zip(codes, zeros, strict=True)
    ]
    return 0 if list(found) == right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
