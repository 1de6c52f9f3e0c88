"""How much of a model is in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Placement:
    """Nothing is computed differently for it: only what is in memory, and when, depends on it."""

    paged: bool = False
    """Decoder blocks are read from the checkpoint when they are needed, and dropped afterwards."""
    spill: Path | None = None
    """A folder for the calibration text's hidden states between two windows; None: they are in memory."""

    @classmethod
    def named(cls, name: str, folder: Path) -> Placement:
        """One of :data:`harness.memory.PLACEMENTS`; ``folder`` takes what is spilled."""
        return cls(paged=name != "in memory", spill=folder if name == "spilled" else None)


IN_MEMORY = Placement()
TOKENS_AT_ONCE = {"cpu": 16_384, "cuda": 131_072}
"""Whose hidden states wait for a block that is being read: enough for their products to take far longer than that."""
