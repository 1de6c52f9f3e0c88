"""What cells need of a machine, and what the machines of a Ray cluster have."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from harness.limits import show_bytes


@dataclass(frozen=True)
class Resources:
    processors: float = 0
    gpus: float = 0
    memory_bytes: float = 0

    def holds(self, need: Resources) -> bool:
        """Whether all of ``need`` is there."""
        return need.processors <= self.processors and need.gpus <= self.gpus and need.memory_bytes <= self.memory_bytes

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.processors + other.processors, self.gpus + other.gpus, self.memory_bytes + other.memory_bytes
        )

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU{'s' if self.gpus != 1 else ''}" if self.gpus else ""
        return f"{self.processors:g} CPU{'s' if self.processors != 1 else ''}{gpus}, {show_bytes(self.memory_bytes)}"


@dataclass(frozen=True)
class Machine:
    name: str
    has: Resources

    def __str__(self) -> str:
        return f"{self.name} ({self.has})"


def machines() -> list[Machine]:
    """The machines that are up, with all that they have, in use or not."""
    return [
        Machine(
            row["NodeManagerHostname"],
            Resources(has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0)),
        )
        for row in ray.nodes()
        if row["Alive"] and (has := row["Resources"]) is not None
    ]
