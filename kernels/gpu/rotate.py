"""DuQuant's online transform: rotate blocks, permute, rotate again, quantize.

In one kernel where a program can hold whole rows, in two elsewhere. Either way rows are stored permuted and read back
in order, since scattered stores are cheaper than scattered loads, which a product would wait for. In one kernel the row
goes through a scratch row of global memory, which nothing but the processor that wrote it reads, out of its cache:
Triton's gather within a row compiles to shuffles by the ten thousand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.act_quant import store_quantized


@triton.jit
def rotated(x, matrix, B: tl.constexpr, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    """Each block of B of the rows ``x`` [BM, BK] times ``matrix``, rounded to DTYPE."""
    i = tl.arange(0, B)
    rotation = tl.load(matrix + i[:, None] * B + i[None, :]).to(DTYPE)
    blocks = x.reshape(x.shape[0] * x.shape[1] // B, B)
    if WIDEN:
        product = tl.dot(blocks.to(tl.float32), rotation.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(blocks, rotation)
    return product.to(DTYPE).reshape(x.shape[0], x.shape[1])


@triton.jit
def rotate_quantize_kernel(
    x, smooth, first, targets, second, middle, codes, scales, zeros, row_sums, y,
    M, K, padded_in, groups, clip, stride_x,
    B: tl.constexpr, HAS_SMOOTH: tl.constexpr, PERMUTES: tl.constexpr, ROTATES_TWICE: tl.constexpr,
    QUANTIZES: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Whole rows: smooth, ``first``, to ``targets`` in ``middle``, ``second``; then codes and all that, or ``y``."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    in_k = k < K
    valid = (m < M)[:, None] & in_k[None, :]
    values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=valid, other=0.0)
    if HAS_SMOOTH:
        divisor = tl.load(smooth + k, mask=in_k, other=1.0).to(DTYPE).to(tl.float32)
        values = tl.div_rn(values.to(tl.float32), tl.broadcast_to(divisor[None, :], values.shape)).to(DTYPE)
    values = rotated(values, first, B, DTYPE, WIDEN)
    if PERMUTES:
        to = tl.load(targets + k, mask=in_k, other=0)
        tl.store(middle + m[:, None] * K + to[None, :], values, mask=valid)
        tl.debug_barrier()  # what other threads of this program stored is seen behind it
        values = tl.load(middle + m[:, None] * K + k[None, :], mask=valid, other=0.0)
    if ROTATES_TWICE:
        values = rotated(values, second, B, DTYPE, WIDEN)
    if QUANTIZES:
        store_quantized(
            values.to(tl.float32), k, m, valid, codes, scales, zeros, row_sums, M, padded_in, groups, clip,
            BITS, SYMMETRIC, GROUP,
        )  # fmt: skip
    else:
        tl.store(y + m[:, None] * K + k[None, :], values, mask=valid)


@triton.jit
def rotate_permute_kernel(
    x, smooth, first, targets, y, M, K, stride_x,
    B: tl.constexpr, HAS_SMOOTH: tl.constexpr, PERMUTES: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM rows of one block: smooth, rotate, store channel k at ``targets[k]``."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * B + tl.arange(0, B)
    in_m = (m < M)[:, None]
    values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=in_m, other=0.0)
    if HAS_SMOOTH:
        divisor = tl.load(smooth + k).to(DTYPE).to(tl.float32)
        values = tl.div_rn(values.to(tl.float32), tl.broadcast_to(divisor[None, :], values.shape)).to(DTYPE)
    values = rotated(values, first, B, DTYPE, WIDEN)
    to = tl.load(targets + k) if PERMUTES else k
    tl.store(y + m[:, None] * K + to[None, :], values, mask=in_m)
