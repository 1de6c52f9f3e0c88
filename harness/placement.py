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
    """A folder for hidden states that wait for a block; None: they wait in memory."""

    @classmethod
    def named(cls, name: str, folder: Path) -> Placement:
        """One of :data:`harness.memory.PLACEMENTS`; ``folder`` takes what is spilled."""
        return cls(paged=name != "in memory", spill=folder if name == "spilled" else None)


IN_MEMORY = Placement()
