"""Ways to damage a file."""

from __future__ import annotations

import random
from collections.abc import Iterator


def damaged(whole: bytes, dice: random.Random) -> bytes:
    """One random mutation: a flipped bit, other bytes, zeroes, a cut, a piece copied over another, bytes in between."""
    at = dice.randrange(len(whole))
    match dice.randrange(6):
        case 0:
            return whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :]
        case 1:
            size = dice.randrange(1, 9)
            return whole[:at] + dice.randbytes(size) + whole[at + size :]
        case 2:
            at -= at % 512
            return whole[:at] + bytes(len(whole[at : at + 512])) + whole[at + 512 :]
        case 3:
            return whole[:at]
        case 4:
            size = 4096 if len(whole) > 8192 else 64
            source, target = (dice.randrange(0, max(1, len(whole) - size), size) for _ in range(2))
            return whole[:target] + whole[source : source + size] + whole[target + size :]
        case _:
            return whole[:at] + dice.randbytes(dice.randrange(1, 9)) + whole[at:]


def all_different(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """``count`` mutations, none of which is the file itself."""
    dice = random.Random(seed)
    while count:
        bad = damaged(whole, dice)
        if bad != whole:
            count -= 1
            yield bad
