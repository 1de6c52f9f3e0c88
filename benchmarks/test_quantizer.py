"""How fast codes are made, read and packed, as ratios to the obvious way in the same run: `tox -e bench`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness.kernels.bits import pack_bits
from harness.quantizer import Grid, WeightFormat, decode, encode, expand, find_grid

BITS = 4


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """The largest of llama2-7b's: 4096 × 11008."""
    return torch.randn(4096, 11008, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def grid(weight: torch.Tensor) -> Grid:
    return find_grid(weight, WeightFormat(BITS, 128))


def whole_scales(grid: Grid, shape: torch.Size) -> list[torch.Tensor]:
    return [part.expand(shape) for part in expand(grid, shape)]


def textbook_encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    scale, zero = whole_scales(grid, weight.shape)
    return torch.clamp(torch.round(weight / scale) + zero, 0, 2**BITS - 1).to(torch.uint8)


def textbook_decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    scale, zero = whole_scales(grid, codes.shape)
    return scale * (codes.float() - zero)


def textbook_pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes a 32-bit word, shifted and added."""
    words = codes.reshape(-1, 8).to(torch.int64)
    return (words << (torch.arange(8) * BITS)).sum(1).to(torch.uint32).view(torch.uint8)


def measured(benchmark, ratio, slow: Callable[[], torch.Tensor], fast: Callable[[], torch.Tensor]) -> float:
    assert torch.equal(slow(), fast())
    found = ratio(slow, fast, rounds=5)
    benchmark.extra_info["ratio to textbook"] = found
    benchmark.pedantic(fast, rounds=3)
    return found


def test_encode(benchmark, ratio, weight: torch.Tensor, grid: Grid) -> None:
    assert measured(benchmark, ratio, lambda: textbook_encode(weight, grid), lambda: encode(weight, grid)) >= 2


def test_decode(benchmark, ratio, weight: torch.Tensor, grid: Grid) -> None:
    codes = encode(weight, grid)
    assert measured(benchmark, ratio, lambda: textbook_decode(codes, grid), lambda: decode(codes, grid)) >= 2


def test_pack(benchmark, ratio, weight: torch.Tensor, grid: Grid) -> None:
    codes = encode(weight, grid)
    assert measured(benchmark, ratio, lambda: textbook_pack(codes), lambda: pack_bits(codes, BITS)) >= 2
