"""W4A8, W4A4 and other integer products: int8 tensor cores on codes, zero points put right afterwards, exactly.

The weight is operand A, and its codes go in times 2^(8 − bits): one shift or one mask a byte. Activations of 4 bits are
int8 too; packed in nibbles they would cost ten times the instructions, and recent GPUs have no 4-bit product anyway.

    Σ (x − zx)(w − zw) = Σ x w − zx Σ w − zw Σ x + n zx zw,  per group of n inputs, in int32
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.codes import raised_strip, tile_rows


@triton.jit
def corrected(
    acc, row_sums, x_zeros, code_sums, zeros, group, groups, count, n, m, N, M,
    BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Σ (x − zx)(w − zw) of a group from Σ x w · 2^(8 − BITS), int32 [BN, BM]."""
    known = n < tl.where(group < groups, N, 0)
    zx = tl.load(x_zeros + m, mask=m < M, other=0)
    total = acc >> (8 - BITS)
    total -= tl.load(code_sums + group * N + n, mask=known, other=0)[:, None] * zx[None, :]
    if ASYMMETRIC:
        zw = tl.load(zeros + group * N + n, mask=known, other=1 << (BITS - 1)).to(tl.int32) - (1 << (BITS - 1))
        sums = tl.load(row_sums + m * groups + group, mask=m < tl.where(group < groups, M, 0), other=0)
        total += zw[:, None] * (count * zx - sums)[None, :]
    return total


@triton.jit
def wna8_kernel(
    x, x_scales, x_zeros, row_sums, qweight, scales, zeros, code_sums, bias, y, M, N, K, tiles_in, groups, padded_out,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``y`` [M, N] from int8 codes ``x`` [M, 128 · tiles_in], padded with zeros. GROUP 0: one group for all inputs."""
    LENGTH: tl.constexpr = 16 * BITS
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, LENGTH)
    in_m, in_n = m < M, n < N
    stored = tl.minimum(n, padded_out - 1)
    rows = tile_rows(qweight, stored // 64, stored % 64, tiles_in, LENGTH)
    acc = tl.zeros((BN, BM), tl.int32)
    grouped = tl.zeros((BN, BM), tl.float32) if GROUP > 0 else 0.0
    for t in range(tiles_in):
        tile = tl.load(rows + t * (64 * LENGTH))
        for strip in tl.static_range(8 // BITS):
            k = t * 128 + strip * LENGTH + j
            inputs = tl.load(x + tl.minimum(m, M - 1)[:, None] * (tiles_in * 128) + k[None, :])
            acc = tl.dot(raised_strip(tile, strip, BITS), tl.trans(inputs), acc, out_dtype=tl.int32)
            if GROUP > 0 and ((strip + 1) * LENGTH) % GROUP == 0:
                group = (t * 128 + strip * LENGTH) // GROUP
                part = corrected(
                    acc, row_sums, x_zeros, code_sums, zeros, group, groups, GROUP, n, m, N, M, BITS, ASYMMETRIC
                )
                scale = tl.load(scales + group * N + n, mask=n < tl.where(group < groups, N, 0), other=0.0).to(
                    tl.float32
                )
                grouped += part.to(tl.float32) * scale[:, None]
                acc = tl.zeros((BN, BM), tl.int32)
    if GROUP > 0:
        total = grouped
    else:
        total = corrected(acc, row_sums, x_zeros, code_sums, zeros, 0, 1, K, n, m, N, M, BITS, ASYMMETRIC)
        total = total.to(tl.float32) * tl.load(scales + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    total = total * tl.load(x_scales + m, mask=in_m, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = y + m[:, None] * N + n[None, :]
    tl.store(out, tl.trans(total).to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
