"""Per-token quantization of activations: int8 codes, scales, zero points, and the sums that weight zero points need."""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.codes import codes_on, grid_of


@triton.jit
def quantize_rows(
    x, stride_x, m, codes, scales, zeros, row_sums, M, K, padded_in, groups, clip,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The rows ``m`` [BM] of ``x``, CHUNK channels at a time: their ranges, then all that an integer product is given.

    Channels from K on have code 0. GROUP: the inputs that a sum is taken over, 0 for a whole row.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    in_m = m < M
    lows = tl.zeros([m.shape[0], CHUNK], tl.float32)  # a range includes zero
    highs = tl.zeros([m.shape[0], CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        valid = in_m[:, None] & (k < K)[None, :]
        values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=valid, other=0.0).to(tl.float32)
        lows, highs = tl.minimum(lows, values), tl.maximum(highs, values)
    scale, zero = grid_of(tl.min(lows, axis=1) * clip, tl.max(highs, axis=1) * clip, BITS, SYMMETRIC)
    tl.store(scales + m, scale, mask=in_m)
    tl.store(zeros + m, zero.to(tl.int32) - HALF, mask=in_m)
    total = tl.zeros([m.shape[0]], tl.int32)
    for start in range(0, padded_in, CHUNK):
        k = start + tl.arange(0, CHUNK)
        valid = in_m[:, None] & (k < K)[None, :]
        values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=valid, other=0.0).to(tl.float32)
        integers = tl.where(valid, codes_on(values, scale, zero, BITS).to(tl.int32) - HALF, 0)
        padded = in_m[:, None] & (k < padded_in)[None, :]
        tl.store(codes + m[:, None] * padded_in + k[None, :], integers.to(tl.int8), mask=padded)
        if GROUP > 0:
            sums = tl.sum(integers.reshape(m.shape[0], CHUNK // GROUP, GROUP), axis=2)
            g = start // GROUP + tl.arange(0, CHUNK // GROUP)
            tl.store(row_sums + m[:, None] * groups + g[None, :], sums, mask=in_m[:, None] & (g < groups)[None, :])
        else:
            total += tl.sum(integers, axis=1)
    if GROUP == 0:
        tl.store(row_sums + m, total, mask=in_m)


@triton.jit
def act_quant_kernel(
    x, codes, scales, zeros, row_sums, M, K, padded_in, groups, clip, stride_x,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BM rows a program."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    quantize_rows(
        x, stride_x, m, codes, scales, zeros, row_sums, M, K, padded_in, groups, clip, BITS, SYMMETRIC, GROUP, CHUNK
    )
