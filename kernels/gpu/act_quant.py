"""Per-token quantization of activations: int8 codes, scales, zero points, and the sums that weight zero points need."""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.codes import quantize_rows


@triton.jit
def store_quantized(
    x, k, m, valid, codes, scales, zeros, row_sums, M, padded_in, groups, clip,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Quantize the rows ``x`` [BM, BK] and store all that an integer product is given. GROUP 0: one sum a row."""
    q, scale, zero = quantize_rows(x, valid, clip, BITS, SYMMETRIC)
    integers = q.to(tl.int32)
    in_m = m < M
    tl.store(
        codes + m[:, None] * padded_in + k[None, :],
        integers.to(tl.int8),
        mask=in_m[:, None] & (k < padded_in)[None, :],
    )
    tl.store(scales + m, scale, mask=in_m)
    tl.store(zeros + m, zero.to(tl.int32), mask=in_m)
    if GROUP > 0:
        sums = tl.sum(integers.reshape(x.shape[0], x.shape[1] // GROUP, GROUP), axis=2)
        g = tl.arange(0, x.shape[1] // GROUP)
        tl.store(row_sums + m[:, None] * groups + g[None, :], sums, mask=in_m[:, None] & (g < groups)[None, :])
    else:
        tl.store(row_sums + m, tl.sum(integers, axis=1), mask=in_m)


@triton.jit
def act_quant_kernel(
    x, codes, scales, zeros, row_sums, M, K, padded_in, groups, clip, stride_x,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows a program; BK: the padded row, rounded up to a power of two."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    valid = (m < M)[:, None] & (k < K)[None, :]
    values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=valid, other=0.0).to(tl.float32)
    store_quantized(
        values, k, m, valid, codes, scales, zeros, row_sums, M, padded_in, groups, clip, BITS, SYMMETRIC, GROUP
    )
