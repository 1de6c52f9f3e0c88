"""DuQuant's online transform: rotate blocks, permute, rotate again, quantize.

In one kernel where rows are short, in two elsewhere. Either way rows are stored permuted and read back in order, since
scattered stores are cheaper than scattered loads, which a product would wait for. In one kernel they go through scratch
rows of global memory, which nothing but the processor that wrote them reads, out of its cache: Triton's gather within a
row compiles to shuffles by the ten thousand. Rows are taken in chunks, so that registers do not depend on their length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.act_quant import quantize_rows


@triton.jit
def smoothed(x, smooth, k, in_k):
    """The channels ``k`` of rows [BM, CHUNK] over their divisors, correctly rounded to the type of ``x``."""
    divisor = tl.load(smooth + k, mask=in_k, other=1.0).to(tl.float32)
    return tl.div_rn(x.to(tl.float32), tl.broadcast_to(divisor[None, :], x.shape)).to(x.dtype)


@triton.jit
def square(matrix, B: tl.constexpr):
    """The matrix [B, B] at ``matrix``."""
    i = tl.arange(0, B)
    return tl.load(matrix + i[:, None] * B + i[None, :])


@triton.jit
def rotated(x, rotation, B: tl.constexpr, WIDEN: tl.constexpr):
    """Each block of B of the rows ``x`` [BM, CHUNK] times ``rotation``, rounded to its type."""
    blocks = x.reshape(x.shape[0] * x.shape[1] // B, B)
    if WIDEN:
        product = tl.dot(blocks.to(tl.float32), rotation.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(blocks, rotation)
    return product.to(x.dtype).reshape(x.shape[0], x.shape[1])


@triton.jit
def rotate_quantize_kernel(
    x, smooth, first, targets, second, middle, y, codes, scales, zeros, row_sums,
    M, K, padded_in, groups, clip, stride_x,
    B: tl.constexpr, HAS_SMOOTH: tl.constexpr, PERMUTES: tl.constexpr, ROTATES_TWICE: tl.constexpr,
    QUANTIZES: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BM rows: smooth, ``first``, to ``targets``, ``second`` by way of ``middle``; that is ``y``. Then its codes."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    in_m = (m < M)[:, None]
    landing = middle if ROTATES_TWICE else y
    rotation = square(first, B)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        in_k = k < K
        valid = in_m & in_k[None, :]
        values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=valid, other=0.0)
        if HAS_SMOOTH:
            values = smoothed(values, smooth, k, in_k)
        to = tl.load(targets + k, mask=in_k, other=0) if PERMUTES else k
        tl.store(landing + m[:, None] * K + to[None, :], rotated(values, rotation, B, WIDEN), mask=valid)
    if ROTATES_TWICE:
        tl.debug_barrier()  # what other threads of this program stored is seen behind it
        rotation = square(second, B)
        for start in range(0, K, CHUNK):
            k = start + tl.arange(0, CHUNK)
            valid = in_m & (k < K)[None, :]
            values = tl.load(middle + m[:, None] * K + k[None, :], mask=valid, other=0.0)
            tl.store(y + m[:, None] * K + k[None, :], rotated(values, rotation, B, WIDEN), mask=valid)
    if QUANTIZES:
        tl.debug_barrier()
        quantize_rows(
            y, K, m, codes, scales, zeros, row_sums, M, K, padded_in, groups, clip, BITS, SYMMETRIC, GROUP, CHUNK
        )


@triton.jit
def rotate_permute_kernel(
    x, smooth, first, targets, y, M, K, stride_x,
    B: tl.constexpr, HAS_SMOOTH: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM rows of one block: smooth, rotate, store channel k at ``targets[k]``."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * B + tl.arange(0, B)
    in_m = (m < M)[:, None]
    values = tl.load(x + m[:, None] * stride_x + k[None, :], mask=in_m, other=0.0)
    if HAS_SMOOTH:
        values = smoothed(values, smooth, k, k < K)
    to = tl.load(targets + k)
    tl.store(y + m[:, None] * K + to[None, :], rotated(values, square(first, B), B, WIDEN), mask=in_m)
