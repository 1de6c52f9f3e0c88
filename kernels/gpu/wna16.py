"""W4A16 and W2A16: codes are dequantized in registers, in front of a float16 or bfloat16 tensor-core product.

It computes Yᵀ = W Xᵀ: the weight is operand A, which tensor cores can take from registers, so that it never goes back
through shared memory. Codes come in words of 16 bits, as wide as the weights that they become: two in a register stay
there, in the order that the matrix instruction wants. The dequantized weight is rounded as the simulation rounds it.

For few tokens one strip of activations is less than 16 bytes for each thread. There strips are joined, in registers and
without a move, until a product takes in 64 inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.gpu.codes import magic_number, magic_strip, tile_rows


@triton.jit
def strip_grid(
    scales, zeros, k_start, row, held, n_start, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_INPUT: tl.constexpr, ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scales and zero points (as :func:`magic_number`) of the inputs from ``k_start`` on, for [BN, strip].

    ``row``: the outputs, from ``n_start`` on, within N unless ``held`` [BN, 1] says which are; of others any number.
    """
    last = K - 1  # padding has no scales of its own; what it is multiplied with is zero, or not stored
    if PER_INPUT:  # groups run along the outputs; a block of outputs lies in one of them
        group = n_start // GROUP if GROUP > 0 else 0
        k = k_start + tl.arange(0, 8 * BITS)
        at = (group * K + tl.minimum(k, last))[None, :]
    else:  # 32 inputs or more, and so all of a strip
        group = tl.minimum(k_start, last) // GROUP if GROUP > 0 else 0
        at = (group * N + row)[:, None]
    scale = tl.load(scales + at) if PER_INPUT else tl.load(scales + at, mask=held)
    if ASYMMETRIC:
        zero = tl.load(zeros + at) if PER_INPUT else tl.load(zeros + at, mask=held)
        return scale, magic_number(zero, DTYPE)
    else:
        HALF: tl.constexpr = 1 << (BITS - 1)
        if DTYPE == tl.float16:
            return scale, tl.full((1, 1), 1024 + HALF, tl.float16)
        else:
            return scale, tl.full((1, 1), 128 + HALF, tl.float32)


@triton.jit
def dequantized_strip(
    tile, scale, zero, STRIP: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """The weights [BN, strip], rounded once: a small integer times a float16 scale is exact in float32."""
    codes = magic_strip(tile, STRIP, BITS, DTYPE, PTX)
    if DTYPE == tl.float16:
        return (codes - zero) * scale
    else:
        wide = scale.to(tl.float32)
        return (codes * wide - zero * wide).to(tl.bfloat16)


@triton.jit
def joined_strips(
    tile, grid, scales, zeros, k_start, row, held, n_start, N, K, FIRST: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_INPUT: tl.constexpr, ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The weights [BN, COUNT strips] from the strip FIRST on. ``grid``: scales and zero points that all of them share;
    None where each has its own."""
    if COUNT == 1:
        if grid is None:
            scale, zero = strip_grid(
                scales, zeros, k_start, row, held, n_start, N, K, BITS, GROUP, PER_INPUT, ASYMMETRIC, DTYPE
            )
        else:
            scale, zero = grid
        return dequantized_strip(tile, scale, zero, FIRST, BITS, DTYPE, PTX)
    else:
        HALF: tl.constexpr = COUNT // 2
        low = joined_strips(
            tile, grid, scales, zeros, k_start, row, held, n_start, N, K, FIRST, HALF,
            BITS, GROUP, PER_INPUT, ASYMMETRIC, DTYPE, PTX,
        )  # fmt: skip
        high = joined_strips(
            tile, grid, scales, zeros, k_start + HALF * 8 * BITS, row, held, n_start, N, K, FIRST + HALF, HALF,
            BITS, GROUP, PER_INPUT, ASYMMETRIC, DTYPE, PTX,
        )  # fmt: skip
        both = tl.permute(tl.join(low, high), (0, 2, 1))
        return tl.reshape(both, (low.shape[0], 2 * low.shape[1]))


@triton.jit
def wna16_kernel(
    x, qweight, scales, zeros, bias, y, M, N, K, tiles_in, tiles_per_split, padded_out, stride_x,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_INPUT: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr, PTX: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``y`` [M, N] of x's type, or float32 partial sums [splits, M, N].

    EVEN_K: 128 divides K. WIDEN: multiply in float32 (interpreter).
    """
    LENGTH: tl.constexpr = 8 * BITS
    DTYPE: tl.constexpr = x.dtype.element_ty
    WHOLE_TILES: tl.constexpr = not PER_INPUT and (GROUP == 0 or GROUP % 128 == 0)  # one scale a row of a tile
    FEW: tl.constexpr = BM < 64  # an activation is read by few products, a strip of them too narrow for wide copies
    WIDE: tl.constexpr = 64 if FEW else LENGTH  # inputs of a product
    n_start = tl.program_id(0) * BN
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = n_start + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    if FEW:  # registers count: a mask, pointers that move on, rows of a tile at distances known beforehand take fewer
        row, held = n, in_n[:, None]
        rows = tile_rows(qweight, tl.minimum(n >> 6, (padded_out >> 6) - 1), n & 63, tiles_in, LENGTH)
    else:  # instructions count: clamps take fewer
        row, held = tl.minimum(n, N - 1), None
        stored = tl.minimum(n, padded_out - 1)
        rows = tile_rows(qweight, stored // 64, stored % 64, tiles_in, LENGTH)
    x_rows = x + tl.minimum(m, M - 1)[:, None] * stride_x  # rows too many are not stored
    first = tl.program_id(2) * tiles_per_split
    if FEW:
        rows += first * (64 * LENGTH)
        x_rows += first * 128 + tl.arange(0, WIDE)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for t in range(first, tl.minimum(first + tiles_per_split, tiles_in)):
        codes = tl.load(rows if FEW else rows + t * (64 * LENGTH))
        grid = None
        for part in tl.static_range(128 // WIDE):
            k_start = t * 128 + part * WIDE
            k = k_start + tl.arange(0, WIDE)
            if (part == 0 and WHOLE_TILES) or (not WHOLE_TILES and not FEW):
                grid = strip_grid(
                    scales, zeros, k_start, row, held, n_start, N, K, BITS, GROUP, PER_INPUT, ASYMMETRIC, DTYPE
                )
            at = x_rows + part * WIDE if FEW else x_rows + k[None, :]
            inputs = tl.load(at) if EVEN_K else tl.load(at, mask=(k < K)[None, :], other=0.0)
            weight = joined_strips(
                codes, grid, scales, zeros, k_start, row, held, n_start, N, K, part * (WIDE // LENGTH), WIDE // LENGTH,
                BITS, GROUP, PER_INPUT, ASYMMETRIC, DTYPE, PTX,
            )  # fmt: skip
            if WIDEN:
                acc = tl.dot(weight.to(tl.float32), tl.trans(inputs.to(tl.float32)), acc, input_precision="ieee")
            else:
                acc = tl.dot(weight, tl.trans(inputs), acc)
        if FEW:
            rows += 64 * LENGTH
            x_rows += 128
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = y + (tl.program_id(2) * M + m)[:, None] * N + n[None, :]
    tl.store(out, tl.trans(acc).to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
