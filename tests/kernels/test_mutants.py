"""The checks can fail: each of these one-line faults, put into a copy of the kernels, is caught."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checks import integer, rotation, weight_only

from harness.kernels.configs import Config
from harness.quantizer import ActivationSpec

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "gpu"
SMALL, FEW = Config(16, 64), Config(4, 64)
A4, A8 = ActivationSpec(4, clip=0.9), ActivationSpec(8)
Check = Callable[[ModuleType], None]


def product(config: Config = SMALL, dtype: torch.dtype = torch.float16, **kind) -> Check:
    shape = {"out": 130, "inputs": 256, **kind}
    return lambda launch: weight_only(launch, 3, config, dtype, **shape)


def integers(spec: ActivationSpec = A4, **kind) -> Check:
    return lambda launch: integer(launch, 3, SMALL, spec, **{"out": 130, "inputs": 256, **kind})


def turning(*, fused: bool) -> Check:
    shape = {"count": 3, "blocks": 12, "size": 32, "spec": A8, "config": Config(4, 256), "steps": 3, "smooth": True}
    return lambda launch: rotation(launch, fused=fused, **shape)


MUTANTS = {
    "order of nibbles": ("codes", "tile >> (BITS * STRIP)", "tile >> (8 - BITS - BITS * STRIP)", product()),
    "order of nibbles, integers": ("codes", "8 - BITS * (STRIP + 1)", "BITS * STRIP", integers()),
    "sign of a code": ("codes", "^ (1 << (BITS - 1))", "^ 0", product(symmetric=True)),
    "rounding of halves": ("codes", "return (x + 12582912.0) - 12582912.0", "return tl.floor(x + 0.5)", integers()),
    "clipped range": ("act_quant", "tl.max(highs, axis=1) * clip", "tl.max(highs, axis=1)", integers()),
    "range of one chunk": ("act_quant", "tl.maximum(highs, values)", "values", integers(inputs=2048 + 256)),
    "sum of one chunk": ("act_quant", "total += tl.sum", "total = tl.sum", integers(inputs=2048 + 256)),
    "address of a tile": ("codes", "tile * (tiles_in * 64", "tile * (64", product()),
    "index of a group": ("wna16", "tl.minimum(k_start, last) // GROUP", "tl.minimum(k_start, last) // (2 * GROUP)",
                         product(group=64)),
    "zero point, bfloat16": ("wna16", "codes * wide - zero * wide", "codes * wide - (zero + 1.0) * wide",
                             product(dtype=torch.bfloat16)),
    "zero point": ("wna16", "(codes - zero) * scale\n", "(codes - zero - 1.0) * scale\n", product()),
    "axis of the scales": ("wna16", "(group * K + tl.minimum(k, last))[None, :]",
                           "(group * K + tl.minimum(row, last))[:, None]", product(axis="ic")),
    "order of joined strips": ("wna16", "tl.join(low, high)", "tl.join(high, low)", product()),
    "order of joined strips, integers": ("wna8", "tl.join(low, high)", "tl.join(high, low)", integers()),
    "part of a load": ("wna8", "low if PART < HALF else high", "high if PART < HALF else low", integers(group=64)),
    "start of a split": ("wna16", "rows += first * (64 * LENGTH)", "rows += 0 * first",
                         product(Config(16, 64, 2), inputs=512)),
    "part of a split": ("wna16_gemv", "first = tl.program_id(2) * tiles_per_split", "first = 0",
                        product(Config(4, 64, 2))),
    "lost tokens": ("wna16_gemv", "(tl.program_id(2) * M + row) * N", "(tl.program_id(2) * M) * N",
                    product(FEW)),
    "bias": ("wna16", "acc += tl.load(bias + n", "acc += 0 * tl.load(bias + n", product(bias=True)),
    "row sums": ("wna8", "(count * zx - sums)", "(count * zx + sums)", integers()),
    "sums of codes": ("wna8", "total -= tl.load(code_sums", "total += tl.load(code_sums", integers(symmetric=True)),
    "scale of a group": ("wna8", "tl.load(scales + group * N + n", "tl.load(scales + n", integers(group=64)),
    "row sums of a group": ("act_quant", "* groups + g[None, :]", "* groups + 0 * g[None, :]", integers(group=64)),
    "rotation transposed": ("rotate", "matrix + i[:, None] * B + i[None, :]", "matrix + i[None, :] * B + i[:, None]",
                            turning(fused=True)),
    "permutation backwards": ("launch", "permutation.targets.to", "permutation.indices.to", turning(fused=True)),
    "permutation backwards, in two": ("launch", "permutation.targets.to", "permutation.indices.to",
                                      turning(fused=False)),
    "one rotation twice": ("rotate", "square(second, B)", "square(first, B)", turning(fused=True)),
    "smoothing": ("rotate", "if HAS_SMOOTH:", "if not HAS_SMOOTH:", turning(fused=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old, new, check = MUTANTS[name]
    package = "mutant_" + "".join(filter(str.isalnum, name))
    shutil.copytree(KERNELS, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / package).glob("*.py"):
        source = path.read_text()
        if path.stem == file:
            assert old in source, f"{file}.py no longer holds {old!r}"
            source = source.replace(old, new)
        path.write_text(source.replace("harness.kernels.gpu", package))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        launch = importlib.import_module(f"{package}.launch")
        with pytest.raises(AssertionError):
            check(launch)
    finally:
        for module in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[module]
