"""What the scripts of this folder share; each has an environment of its own, so this needs torch and safetensors only.

`calibration.py` writes the token ids, each `run_*.py` quantizes with a released library and writes the weights that its
integers stand for, `score.py` scores all of them with the harness's own perplexity. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SEQUENCES_AT_ONCE = 4  # 2,048 tokens, as the harness's own chunks


@dataclass(frozen=True)
class Job:
    """One model, quantized once by one library."""

    model: Path
    calibration: Path
    out: Path
    bits: int
    group_size: int
    threads: int
    variant: str

    @classmethod
    def from_command_line(cls, description: str, variants: tuple[str, ...] = ("same-protocol",)) -> Job:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("model", type=Path, help="folder of the checkpoint")
        parser.add_argument("calibration", type=Path, help="token ids written by calibration.py")
        parser.add_argument("out", type=Path, help="safetensors file to write the dequantized weights to")
        parser.add_argument("--bits", type=int, default=4)
        parser.add_argument("--group-size", type=int, default=64)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--variant", choices=variants, default=variants[0])
        job = cls(**vars(parser.parse_args()))
        torch.set_num_threads(job.threads)
        return job

    def ids(self) -> torch.Tensor:
        """Token ids [sequences, length]."""
        return load_file(self.calibration)["ids"]

    def write(self, weights: dict[str, torch.Tensor], took: Took, about: str) -> None:
        """The weight that each quantized linear's integers stand for, by module name, and what it took."""
        facts = {
            "about": about,
            "bits": self.bits,
            "group_size": self.group_size,
            "threads": self.threads,
            "variant": self.variant,
            "wall_seconds": took.wall_seconds,
            "cpu_seconds": took.cpu_seconds,
        }
        save_file({name: w.contiguous() for name, w in weights.items()}, self.out, {"facts": json.dumps(facts)})
        print(json.dumps(facts | {"linears": len(weights)}))


@dataclass
class Took:
    """Wall-clock seconds, and those of the processor in this process's threads (user and system)."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Took]:
    took = Took()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield took
    took.wall_seconds, took.cpu_seconds = time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def linears_of_blocks(
    model: torch.nn.Module, weight: Callable[[torch.nn.Module], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """``weight`` of every module of the decoder blocks for which it is not None, by the names of Llama checkpoints."""
    found = ((name, weight(module)) for name, module in model.named_modules() if ".layers." in f".{name}.")
    return {name: w.detach().clone() for name, w in found if w is not None}
