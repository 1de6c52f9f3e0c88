"""W4A16 and W2A16 for one to four tokens, without tensor cores, 12 to 15 of whose 16 rows would be idle."""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.wna16 import dequantized_strip


@triton.jit
def wna16_gemv_kernel(
    x, qweight, scales, zeros, bias, y, M, N, K, tiles_in, tiles_per_split, padded_out, stride_x,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_INPUT: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, WIDEN: tl.constexpr, PTX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As :func:`harness.kernels.gpu.wna16.wna16_kernel`, for M ≤ BM; every weight is read once."""
    LENGTH: tl.constexpr = 16 * BITS
    DTYPE: tl.constexpr = x.dtype.element_ty
    n_start = tl.program_id(0) * BN
    n = n_start + tl.arange(0, BN)
    m = tl.arange(0, BM)
    j = tl.arange(0, LENGTH)
    in_m, in_n = m < M, n < N
    rows = qweight + (n // 64) * (tiles_in * 64 * LENGTH) + (n % 64) * LENGTH
    first = tl.program_id(2) * tiles_per_split
    acc = tl.zeros((BM, BN, LENGTH), tl.float32)
    for t in range(first, tl.minimum(first + tiles_per_split, tiles_in)):
        tile = tl.load(rows[:, None] + t * (64 * LENGTH) + j[None, :], mask=(n < padded_out)[:, None], other=0)
        for strip in tl.static_range(8 // BITS):
            k_start = t * 128 + strip * LENGTH
            k = k_start + j
            inputs = tl.load(x + m[:, None] * stride_x + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0.0)
            weight = dequantized_strip(
                tile,
                scales,
                zeros,
                k,
                k_start,
                n,
                n_start,
                K,
                N,
                in_n,
                strip,
                BITS,
                GROUP,
                PER_INPUT,
                ASYMMETRIC,
                DTYPE,
                PTX,
            )
            acc += weight.to(tl.float32)[None, :, :] * inputs.to(tl.float32)[:, None, :]
    total = tl.sum(acc, axis=2)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out = y + (tl.program_id(2) * M + m)[:, None] * N + n[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
