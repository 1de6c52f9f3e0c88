"""Parts that the Triton kernels share: unpacking a strip of codes, and rounding rows to per-token grids.

On the fast paths no integer is converted to a float: a small unsigned integer is put into the low mantissa bits of 1024
(float16) or 128 (bfloat16), where its distance from them is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(qweight, tile, row, tiles_in, LENGTH: tl.constexpr):
    """Where the codes [BN, LENGTH words] of rows of tiles lie in the first tile of each."""
    return (qweight + tile * (tiles_in * 64 * LENGTH) + row * LENGTH)[:, None] + tl.arange(0, LENGTH)[None, :]


@triton.jit
def magic_number(fields, DTYPE: tl.constexpr):
    """1024 + ``fields`` in float16, or 128 + ``fields`` in float32 by way of bfloat16."""
    if DTYPE == tl.float16:
        return (fields.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    else:
        return (fields.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def unsigned_strip(tile, STRIP: tl.constexpr, BITS: tl.constexpr):
    """The codes of a strip, 0 … 2^BITS − 1, from words that hold them as two's complement."""
    MASK: tl.constexpr = (1 << BITS) - 1
    return ((tile >> (BITS * STRIP)) & MASK) ^ (1 << (BITS - 1))


@triton.constexpr_function
def unpacking_ptx(strip, bits, magic):
    """Two words of a register to two half-precision numbers in another: ``magic``, the code in its mantissa.

    Triton's own lowering takes words apart one by one.
    """
    mask, number = (1 << bits) - 1, magic | 1 << (bits - 1)
    return "\n".join(
        ["{", ".reg .b32 t;", f"shr.u32 t, $1, {bits * strip};",
         f"lop3.b32 $0, t, {mask * 0x10001:#x}, {number * 0x10001:#x}, 0x6a;", "}"]
    )  # fmt: skip


@triton.jit
def magic_strip(tile, STRIP: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The codes of a strip as :func:`magic_number` gives them. PTX: by instructions of NVIDIA's."""
    if not PTX:
        return magic_number(unsigned_strip(tile, STRIP, BITS), DTYPE)
    elif DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            unpacking_ptx(STRIP, BITS, 0x6400), "=r,r", [tile], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            unpacking_ptx(STRIP, BITS, 0x4300), "=r,r", [tile], dtype=tl.bfloat16, is_pure=True, pack=2
        ).to(tl.float32)


@triton.constexpr_function
def raising_ptx(strip, bits):
    """Four bytes of a register to four of another: a field of each at the top, zeros below it.

    Triton's own lowering takes bytes apart one by one.
    """
    left, mask = 8 - bits * (strip + 1), (1 << 8) - (1 << (8 - bits))
    return "\n".join(["{", ".reg .b32 t;", f"shl.b32 t, $1, {left};", f"and.b32 $0, t, {mask * 0x1010101:#x};", "}"])


@triton.jit
def raised_strip(tile, STRIP: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """The signed codes of a strip times 2^(8 − BITS), int8, from int8 bytes. PTX: by instructions of NVIDIA's."""
    if PTX and BITS < 8:
        return tl.inline_asm_elementwise(raising_ptx(STRIP, BITS), "=r,r", [tile], dtype=tl.int8, is_pure=True, pack=4)
    else:
        LEFT: tl.constexpr = 8 - BITS * (STRIP + 1)
        TOP: tl.constexpr = -(1 << (8 - BITS))
        raised = tile << LEFT if LEFT > 0 else tile
        return raised & TOP if BITS * STRIP > 0 else raised


@triton.jit
def rounded(x):
    """Round half to even: adding 1.5 · 2^23 leaves no bits for a fraction. For |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def grid_of(low, high, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scales and zero points (unsigned, as float32) of rows whose clipped ranges are from ``low`` to ``high`` [rows].

    As :func:`harness.quantizer.encode_tokens` has them: by the correctly rounded division, without which a value near
    the middle between two levels would go the other way.
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    if SYMMETRIC:
        high = tl.maximum(-low, high)
        low = -high
    scale = tl.div_rn(high - low, LEVELS * 1.0)
    scale = tl.where(scale == 0.0, 2.0 / LEVELS, scale)
    zero = tl.full(scale.shape, 1 << (BITS - 1), tl.float32) if SYMMETRIC else rounded(tl.div_rn(-low, scale))
    return scale, zero


@triton.jit
def codes_on(x, scale, zero, BITS: tl.constexpr):
    """The unsigned codes of ``x`` [rows, n] on the grids of its rows, as float32."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    values = rounded(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))) + zero[:, None]
    return tl.minimum(tl.maximum(values, 0.0), LEVELS * 1.0)
