"""Launch configurations as plain data: per kernel, architecture and number of tokens.

Those here compile without spills on all targets (``harness bench --static`` checks that); which is fastest, only a GPU
can tell. ``benchmarks/gpu_verify`` measures that and keeps one file per GPU model beside this one, in ``tuned/``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from harness import atomic
from harness.kernels.pack import TILE_IN

Kernel = Literal["wna16", "wna16_narrow", "wna16_ic", "wna16_gemv", "wna8", "wna8_grouped", "rotate"]
"""Kernels with configurations of their own. ``wna16_narrow``: groups of 32 or 64 inputs, more scales at a time.
``wna16_ic``: groups run along the outputs, and a block of outputs has to lie in one of them: 64 divides them all.
``wna8_grouped``: a block keeps the sums of a group beside those of the row. ``rotate``: DuQuant's transform."""
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
GEMV_ROWS = 4  # tokens up to which the kernel without tensor cores is taken
_TUNED = Path(__file__).resolve().parent / "tuned"


@dataclass(frozen=True)
class Config:
    """Tokens and outputs of a block, parts that the inputs are split into, warps, pipeline stages.

    A rotation turns ``block_n`` channels of its tokens at a time; the two make 16 rows or more of the largest rotation.
    ``registers``: the most that a thread may take; None: as many as the compiler likes.
    """

    block_m: int
    block_n: int
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}  # AMD's compiler knows no such option
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @property
    def unlimited(self) -> Config:
        """For bfloat16: its weights pass through float32, and would not fit where those of float16 do."""
        return replace(self, registers=None)


_ANY = math.inf
_DEFAULT: dict[Kernel, tuple[tuple[float, Config], ...]] = {
    "wna16_gemv": (
        (1, Config(1, 16, warps=1, stages=3)),
        (2, Config(2, 16, warps=2, stages=3)),
        (_ANY, Config(4, 16, warps=4, stages=3)),
    ),
    "wna16": (
        (16, Config(16, 64, warps=4, stages=4)),
        (64, Config(64, 64, warps=4, stages=3)),
        (_ANY, Config(128, 128, warps=8, stages=2)),
    ),
    "wna16_ic": (
        (16, Config(16, 64, warps=4, stages=4)),
        (_ANY, Config(64, 64, warps=4, stages=3)),
    ),
    "wna8": (
        (16, Config(16, 64, warps=4, stages=4)),
        (64, Config(64, 64, warps=4, stages=3)),
        (_ANY, Config(128, 128, warps=8, stages=3)),
    ),
    "wna8_grouped": (
        (16, Config(16, 64, warps=4, stages=4)),
        (_ANY, Config(32, 128, warps=8, stages=3)),
    ),
    # Few tokens: a row for each program, many of its channels at a time. More: its matrices are read for 16 rows.
    "rotate": (
        (256, Config(1, 2048, warps=8, stages=1)),
        (_ANY, Config(16, 128, warps=4, stages=1)),
    ),
}
_DEFAULT["wna16_narrow"] = _DEFAULT["wna16"]
# Where the default does not fit a target.
_ADA = (
    _DEFAULT["wna16"][0],
    # 17 to 32 tokens are not multiplied as if they were 64; 78 registers, not 90. Beyond 32 tokens weights are unpacked
    # twice: 7 instructions for a product, which by their published peak these tensor cores need 32 clocks for.
    (64, Config(32, 128, warps=8, stages=3)),
    # Two of these blocks are resident at once, of 128 × 128 one.
    (256, Config(64, 128, warps=8, stages=3)),
    _DEFAULT["wna16"][-1],
)
_OVERRIDES: dict[tuple[Kernel, str], tuple[tuple[float, Config], ...]] = {
    # Left alone the compiler takes 57 registers around a loop of 212 instructions, not of 217;
    ("wna16", "sm_80"): ((16, Config(16, 64, warps=4, stages=4, registers=48)), *_DEFAULT["wna16"][1:]),
    # here, with the weights of two products in flight, 72 around 236, not 249.
    ("wna16", "sm_90"): ((16, Config(16, 64, warps=4, stages=4, registers=56)), *_DEFAULT["wna16"][1:]),
    ("wna16", "sm_86"): _ADA,
    ("wna16", "sm_89"): _ADA,
    # With three stages eight bytes would be spilled.
    ("wna16_narrow", "sm_80"): (
        _DEFAULT["wna16"][0],
        (64, Config(64, 64, warps=4, stages=4)),
        _DEFAULT["wna16"][-1],
    ),
    ("wna16_narrow", "sm_86"): _ADA,
    ("wna16_narrow", "sm_89"): _ADA,
    # Two warps share what one would keep in 78 registers: then as many blocks fit as there may be.
    ("wna16_gemv", "sm_90"): ((1, Config(1, 16, warps=2, stages=3)), *_DEFAULT["wna16_gemv"][1:]),
    # Left alone the compiler takes nine registers more, for a longer epilogue around the same loop.
    ("wna8", "sm_90"): (*_DEFAULT["wna8"][:-1], (_ANY, Config(128, 128, warps=8, stages=3, registers=176))),
    # 32 × 128 would be spilled.
    ("wna8_grouped", "gfx942"): (_DEFAULT["wna8_grouped"][0], (_ANY, Config(64, 64, warps=8, stages=3))),
    # A product of datacenter Blackwell's tensor memory takes more instructions around it than 16 tokens are worth; two
    # warps multiply them in registers.
    ("wna8", "sm_100"): ((16, Config(16, 32, warps=2, stages=4)), *_DEFAULT["wna8"][1:]),
    ("wna8_grouped", "sm_100"): (
        (16, Config(16, 32, warps=2, stages=4)),
        (_ANY, Config(64, 64, warps=8, stages=3)),
    ),
    ("wna16", "sm_100"): ((16, Config(16, 32, warps=2, stages=4)), *_DEFAULT["wna16"][1:]),
    ("wna16_narrow", "sm_100"): ((16, Config(16, 32, warps=2, stages=4)), *_DEFAULT["wna16"][1:]),
    ("wna16_ic", "sm_100"): ((16, Config(16, 32, warps=2, stages=4)), *_DEFAULT["wna16_ic"][1:]),
}


def shipped(kernel: Kernel, target: str) -> tuple[Config, ...]:
    """All configurations that :func:`choose` may return for a target when nothing was tuned, before splitting."""
    return tuple(config for _, config in _OVERRIDES.get((kernel, target), _DEFAULT[kernel]))


def choose(
    kernel: Kernel, target: str, tokens: int, outputs: int, inputs: int, processors: int, gpu: str | None = None
) -> Config:
    """The configuration for a shape: tuned on this ``gpu`` model if there is such a file, else the shipped one.

    The weight-only kernels split the inputs until every one of the GPU's ``processors`` has two blocks to work on, or
    the partial sums, 8 bytes written and read for each, would be more than the weights.
    """
    if gpu is not None and (tuned := read_tuned(gpu).get(key(kernel, tokens, outputs, inputs))):
        return tuned
    table = _OVERRIDES.get((kernel, target), _DEFAULT[kernel])
    config = next(config for most, config in table if tokens <= most)
    if not kernel.startswith("wna16"):
        return config
    blocks = -(-outputs // config.block_n) * -(-tokens // config.block_m)
    tiles = -(-inputs // TILE_IN)
    split = 1
    while blocks * split < 2 * processors and split * 4 <= tiles and 32 * split * tokens <= inputs:
        split *= 2
    return replace(config, split_k=split)


def key(kernel: Kernel, tokens: int, outputs: int, inputs: int) -> str:
    """A shape's name in a file of tuned configurations; token counts are rounded up to powers of two."""
    return f"{kernel} {1 << max(0, tokens - 1).bit_length()} {outputs} {inputs}"


def tuned_file(gpu: str) -> Path:
    return _TUNED / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


@functools.cache  # asked for at every call of a layer
def read_tuned(gpu: str) -> Mapping[str, Config]:
    """What was tuned on this GPU model, empty if nothing was."""
    path = tuned_file(gpu)
    if not path.is_file():
        return {}
    return {name: Config(**value) for name, value in json.loads(path.read_text())["configs"].items()}


def write_tuned(gpu: str, fingerprint: dict[str, object], configs: dict[str, Config]) -> Path:
    """One file per GPU model, with what it was last tuned on; what it has of other shapes stays."""
    path = tuned_file(gpu)
    path.parent.mkdir(exist_ok=True)
    known = {**read_tuned(gpu), **configs}
    content = {"fingerprint": fingerprint, "configs": {name: asdict(value) for name, value in sorted(known.items())}}
    atomic.write_json(path, content)
    read_tuned.cache_clear()
    return path
