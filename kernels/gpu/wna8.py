"""W4A8, W4A4 and other integer products: int8 tensor cores on codes, zero points put right afterwards, exactly.

The weight is operand A, and its codes go in times 2^(8 − bits): a shift and a mask for the four codes of a register.
Activations of 4 bits are int8 too; packed in nibbles they would cost many times the instructions, and recent GPUs have
no 4-bit product anyway.

A product takes in a whole group, strips joined. For few tokens a load takes in 128 inputs, so that each thread copies
16 bytes; where groups are smaller, it is taken apart afterwards. Whole channels of many tokens are multiplied strip by
strip: then the compiler gives every warp outputs of its own, and no code is unpacked twice.

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
def joined_strips(tile, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """The weights [BN, COUNT strips] from the strip FIRST on, joined in registers and without a move."""
    if COUNT == 1:
        return raised_strip(tile, FIRST, BITS, PTX)
    else:
        HALF: tl.constexpr = COUNT // 2
        low = joined_strips(tile, FIRST, HALF, BITS, PTX)
        high = joined_strips(tile, FIRST + HALF, HALF, BITS, PTX)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def part_of(inputs, PART: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS equal parts, [BM, columns / PARTS], of ``inputs`` [BM, columns]."""
    if PARTS == 1:
        return inputs
    else:
        HALF: tl.constexpr = PARTS // 2
        halves = tl.reshape(inputs, (inputs.shape[0], 2, inputs.shape[1] // 2))
        low, high = tl.split(tl.permute(halves, (0, 2, 1)))
        return part_of(low if PART < HALF else high, PART % HALF, HALF)


@triton.jit
def wna8_kernel(
    x, x_scales, x_zeros, row_sums, qweight, scales, zeros, code_sums, bias, y, M, N, K, tiles_in, groups, padded_out,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``y`` [M, N] from int8 codes ``x`` [M, 128 · tiles_in], padded with zeros. GROUP 0: one group for all inputs."""
    LENGTH: tl.constexpr = 16 * BITS
    FEW: tl.constexpr = BM < 64  # a strip of them is too narrow for wide copies; as in wna16, pointers move on
    WIDE: tl.constexpr = GROUP if GROUP > 0 else 128 if FEW else LENGTH  # inputs of a product
    LOADED: tl.constexpr = 128 if FEW else WIDE  # inputs of a load, of one product or several
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    stored = tl.minimum(n, padded_out - 1)
    rows = tile_rows(qweight, stored // 64, stored % 64, tiles_in, LENGTH)
    x_rows = x + tl.minimum(m, M - 1)[:, None] * (tiles_in * 128) + tl.arange(0, LOADED)[None, :]
    acc = tl.zeros((BN, BM), tl.int32)
    grouped = tl.zeros((BN, BM), tl.float32) if GROUP > 0 else 0.0
    for t in range(tiles_in):
        tile = tl.load(rows if FEW else rows + t * (64 * LENGTH))
        for product in tl.static_range(128 // WIDE):
            k_start = t * 128 + product * WIDE
            if product * WIDE % LOADED == 0:
                loaded = tl.load(x_rows + product * WIDE if FEW else x_rows + k_start)
            inputs = part_of(loaded, product % (LOADED // WIDE), LOADED // WIDE)
            weight = joined_strips(tile, product * (WIDE // LENGTH), WIDE // LENGTH, BITS, PTX)
            acc = tl.dot(weight, tl.trans(inputs), acc, out_dtype=tl.int32)
            if GROUP > 0:
                group = k_start // GROUP
                part = corrected(
                    acc, row_sums, x_zeros, code_sums, zeros, group, groups, GROUP, n, m, N, M, BITS, ASYMMETRIC
                )
                scale = tl.load(scales + group * N + n, mask=n < tl.where(group < groups, N, 0), other=0.0).to(
                    tl.float32
                )
                grouped += part.to(tl.float32) * scale[:, None]
                acc = tl.zeros((BN, BM), tl.int32)
        if FEW:
            rows += 64 * LENGTH
            x_rows += 128
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
