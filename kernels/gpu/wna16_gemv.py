"""W4A16 and W2A16 for one to four tokens, without tensor cores, 12 to 15 of whose 16 rows would be idle.

A thread keeps a sum for every weight of its share of a tile, and adds them up at the end: no thread waits for another
in between, and codes stay in the layout that they were loaded in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.codes import tile_rows
from harness.kernels.gpu.wna16 import dequantized_strip, strip_grid


@triton.jit
def weighted(weight, x, row: tl.constexpr, k, M, K, stride_x, EVEN_K: tl.constexpr):
    """``weight`` [BN, strip] times the inputs ``k`` of one token, float32."""
    at = x + tl.minimum(row, M - 1) * stride_x + k  # tokens too many are not stored
    inputs = tl.load(at) if EVEN_K else tl.load(at, mask=k < K, other=0.0)
    return weight * inputs.to(tl.float32)[None, :]


@triton.jit
def store_row(acc, bias, y, row: tl.constexpr, n, M, N, HAS_BIAS: tl.constexpr):
    """The sums of one token's products, and the bias."""
    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    out = y + (tl.program_id(2) * M + row) * N + n
    tl.store(out, total.to(y.dtype.element_ty), mask=n < tl.where(row < M, N, 0))


@triton.jit
def wna16_gemv_kernel(
    x, qweight, scales, zeros, bias, y, M, N, K, tiles_in, tiles_per_split, padded_out, stride_x,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_INPUT: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr, PTX: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """As :func:`harness.kernels.gpu.wna16.wna16_kernel`, for M ≤ BM ≤ 4; every weight is read once."""
    LENGTH: tl.constexpr = 8 * BITS
    DTYPE: tl.constexpr = x.dtype.element_ty
    WHOLE_TILES: tl.constexpr = not PER_INPUT and (GROUP == 0 or GROUP % 128 == 0)  # one scale a row of a tile
    n_start = tl.program_id(0) * BN
    n = n_start + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)
    stored = tl.minimum(n, padded_out - 1)
    rows = tile_rows(qweight, stored // 64, stored % 64, tiles_in, LENGTH)
    first = tl.program_id(2) * tiles_per_split
    acc0 = tl.zeros((BN, LENGTH), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0  # of tokens that there are not: nothing comes of them
    for t in range(first, tl.minimum(first + tiles_per_split, tiles_in)):
        tile = tl.load(rows + t * (64 * LENGTH))
        for strip in tl.static_range(16 // BITS):
            k_start = t * 128 + strip * LENGTH
            k = k_start + tl.arange(0, LENGTH)
            if strip == 0 or not WHOLE_TILES:
                scale, zero = strip_grid(
                    scales, zeros, k_start, row, None, n_start, N, K, BITS, GROUP, PER_INPUT, ASYMMETRIC, DTYPE
                )
            weight = dequantized_strip(tile, scale, zero, strip, BITS, DTYPE, PTX).to(tl.float32)
            acc0 += weighted(weight, x, 0, k, M, K, stride_x, EVEN_K)
            if BM > 1:
                acc1 += weighted(weight, x, 1, k, M, K, stride_x, EVEN_K)
            if BM > 2:
                acc2 += weighted(weight, x, 2, k, M, K, stride_x, EVEN_K)
                acc3 += weighted(weight, x, 3, k, M, K, stride_x, EVEN_K)
    store_row(acc0, bias, y, 0, n, M, N, HAS_BIAS)
    if BM > 1:
        store_row(acc1, bias, y, 1, n, M, N, HAS_BIAS)
    if BM > 2:
        store_row(acc2, bias, y, 2, n, M, N, HAS_BIAS)
        store_row(acc3, bias, y, 3, n, M, N, HAS_BIAS)
