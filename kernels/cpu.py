"""Packed layers on a CPU, through our own kernels or torch's operators for 4- and 8-bit weights. Every path says which
operator runs.

torch has several operators of this kind that fall back to scalar loops, 30 to 100 times slower than a float product,
without a word: the int4 operator for anything but bfloat16 input, ``_int_mm`` and int8 × int8 ``qlinear`` on processors
without VNNI, ``_dyn_quant_matmul_4bit`` on x86. None of them is ever called here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from harness.errors import Unsupported
from harness.kernels import fixedpoint, integers, native
from harness.kernels.pack import PackedLinear, unpack
from harness.kernels.paths import Path, Product, Products, Rows
from harness.provenance import cpu
from harness.quantizer import encode_tokens, simulate_tokens

# On processors that multiply bfloat16 in hardware, dequantizing beats a product with the codes beyond so many tokens.
CODES_TOKENS_BESIDE_BF16_UNITS = 16
INT4_OPERATOR = "aten::_weight_int4pack_mm_for_cpu"
_INT4_GROUPS = (32, 64, 128, 256)
_INTEGER_OPERATOR = "onednn::qlinear_pointwise"
_INNER_TILES = 2  # the operator's own layout parameter; it takes no other on a CPU


@dataclass(frozen=True)
class FewTokens(Path):
    """One path for few tokens, another for many: where weights are not read in next to no time beside what is done."""

    layer: PackedLinear
    few: FixedPointWeights | Int4Weights
    many: DequantizedWeights
    most: int
    """Tokens that are few."""

    def for_rows(self, rows: int) -> FixedPointWeights | Int4Weights | DequantizedWeights:
        return self.few if rows <= self.most else self.many

    def operator(self, rows: int) -> str:
        return self.for_rows(rows).operator(rows)

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        return self.for_rows(rows).product(rows, dtype)

    def multiply(self, given: Rows, dtype: torch.dtype) -> Products:
        return self.for_rows(len(given)).multiply(given, dtype)


@dataclass(frozen=True)
class FixedPointWeights(Path):
    """W4A16 by our own kernel: activations in 16-bit fixed point, a step for each block of inputs, exact sums.

    An activation is off by half a step at the most, 1 / 65534 of the largest of its block;
    scales and zero points are as they are. A row with NaN or infinity in it gives NaN throughout.
    """

    layer: PackedLinear
    buffer: torch.Tensor

    @classmethod
    def of(cls, layer: PackedLinear) -> FixedPointWeights:
        return cls(layer, fixedpoint.buffer_of(layer))

    def operator(self, rows: int) -> str:
        return fixedpoint.OPERATOR

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        return Product(fixedpoint.OPERATOR, dtype if dtype in fixedpoint.TYPES else torch.float32)

    def multiply(self, given: Rows, dtype: torch.dtype) -> Products:
        x = given if given.dtype in fixedpoint.TYPES else given.float()
        y = fixedpoint.product(x, self.buffer, self.layer.out_features)
        return y if y.dtype == dtype else y.to(dtype)  # with cold caches even what does nothing takes torch a while


@dataclass(frozen=True)
class Int4Weights(Path):
    """W4A16: 4-bit weights and bfloat16 activations; the scales and zero points are rounded to bfloat16 too."""

    layer: PackedLinear
    qweight: torch.Tensor
    grid: torch.Tensor

    @classmethod
    def of(cls, layer: PackedLinear) -> Int4Weights:
        linear = unpack(layer)
        scales = linear.scales.float()
        offsets = (8.0 - linear.zeros.float()) * scales  # the operator computes (code − 8) · scale + offset
        grid = torch.stack([scales.T, offsets.T], dim=2).bfloat16().contiguous()
        codes = linear.codes.int().contiguous()
        return cls(layer, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES), grid)

    def operator(self, rows: int) -> str:
        return INT4_OPERATOR

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        return Product(INT4_OPERATOR, torch.bfloat16)

    def multiply(self, given: Rows, dtype: torch.dtype) -> Products:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            given.bfloat16().contiguous(), self.qweight, self.layer.group_size, self.grid
        )
        return _finished(y, self.layer, dtype)


@dataclass(frozen=True)
class IntegerWeights(Path):
    """W4A8, W4A4, W8A8 by our own kernel: codes of both, zero points taken off within the exact sum of a group.

    The bits of the kernel on a GPU with a float32 result.
    """

    layer: PackedLinear
    buffer: torch.Tensor

    @classmethod
    def of(cls, layer: PackedLinear) -> IntegerWeights:
        return cls(layer, integers.buffer_of(layer))

    def operator(self, rows: int) -> str:
        return integers.OPERATOR

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        return Product(integers.OPERATOR, torch.int8)

    @property
    def reads(self) -> Hashable:
        return self.layer.activation, integers.group_of(self.layer)

    def given(self, x: Rows) -> integers.Tokens:
        assert self.layer.activation is not None
        return integers.encode(x, self.layer.activation, integers.group_of(self.layer))

    def multiply(self, given: integers.Tokens, dtype: torch.dtype) -> Products:
        y = integers.product(given, self.buffer, self.layer.out_features)
        return y if dtype == torch.float32 else y.to(dtype)


@dataclass(frozen=True)
class IntegerProduct(Path):
    """The same without a C compiler, for whole channels: torch's product of unsigned and signed bytes.

    4-bit values are in bytes here. The sum is exact up to its conversion to float32; the activations' zero points are
    taken off afterwards.
    """

    layer: PackedLinear
    weight: torch.Tensor
    scales: torch.Tensor
    weight_zeros: torch.Tensor
    scaled_sums: torch.Tensor

    @classmethod
    def of(cls, layer: PackedLinear) -> IntegerProduct:
        linear = unpack(layer)
        codes = (linear.codes.short() - linear.zeros.short()).to(torch.int8).contiguous()
        scales = linear.scales[:, 0].float()
        # The operator reads raw storage as [out, in]: a transposed view of a square weight would pass, and be wrong.
        prepacked = torch.ops.onednn.qlinear_prepack(codes, None)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        return cls(layer, prepacked, scales, zeros, codes.sum(1, dtype=torch.int64).float() * scales)

    def operator(self, rows: int) -> str:
        return _INTEGER_OPERATOR

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        return Product(_INTEGER_OPERATOR, torch.uint8)

    @property
    def reads(self) -> Hashable:
        return self.layer.activation

    def given(self, x: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.layer.activation is not None
        return encode_tokens(x, self.layer.activation)

    def multiply(self, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], dtype: torch.dtype) -> Products:
        codes, scale, zero = given
        y = qlinear(codes, self.weight, self.scales, self.weight_zeros)
        return _finished(y.addr_(zero[:, 0], self.scaled_sums, alpha=-1).mul_(scale), self.layer, dtype)


@dataclass(frozen=True)
class DequantizedWeights(Path):
    """Everything else: a bfloat16 product with the weight that the codes stand for, activations quantized and back."""

    layer: PackedLinear
    weight: torch.Tensor

    @classmethod
    def of(cls, layer: PackedLinear) -> DequantizedWeights:
        return cls(layer, unpack(layer).weight().bfloat16())

    def operator(self, rows: int) -> str:
        return "aten::mm of bfloat16, dequantized"

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        return Product("aten::mm", torch.bfloat16)

    @property
    def reads(self) -> Hashable:
        return self.layer.activation

    def given(self, x: Rows) -> Rows:
        return (x if self.layer.activation is None else simulate_tokens(x, self.layer.activation)).bfloat16()

    def multiply(self, given: Rows, dtype: torch.dtype) -> Products:
        return _finished(torch.mm(given.bfloat16(), self.weight.T), self.layer, dtype)


class CpuKernels:
    """All of them, as :class:`harness.kernels.paths.Kernels` has it."""

    def path(self, layer: PackedLinear) -> Path:
        return cpu_path(layer)

    def preparing(self, path: Path) -> Callable[[Rows], Any]:
        transform = path.layer.transform
        return path.given if transform is None else lambda x: path.given(transform.apply(x))


def cpu_path(layer: PackedLinear) -> Path:
    """The fastest path that there is for a layer on this processor.

    Raises Unsupported where an integer product is declared and torch has none that is fast and exact here.
    """
    if layer.activation is None:
        few = _for_few_tokens(layer)
        if few is None:
            return DequantizedWeights.of(layer)
        if has_bf16_units():
            return FewTokens(layer, few, DequantizedWeights.of(layer), CODES_TOKENS_BESIDE_BF16_UNITS)
        return few
    if layer.axis == "ic":  # scales along the inputs cannot leave an integer sum
        return DequantizedWeights.of(layer)
    if native.unavailable() is None and layer.bits <= native.library().wna8_bits():
        return IntegerWeights.of(layer)
    return _by_torch(layer)


def _by_torch(layer: PackedLinear) -> IntegerProduct:
    if not layer.whole_channels:
        raise Unsupported(
            f"no CPU operator multiplies integers in groups of {layer.group_size}",
            fix="a C compiler and AVX2, a setting without g, or a GPU",
        )
    if layer.bits == 8 and not exact_with_bytes():
        raise Unsupported(
            "this processor adds products of two bytes in 16 bits, which 8-bit weights overflow",
            fix="4-bit weights, or a processor with VNNI",
        )
    if layer.bits == 8 and layer.zeros is not None:
        raise Unsupported(
            "the integer operator has signed bytes, which codes of 8 bits less their zero points do not fit into",
            fix="a C compiler, or a symmetric setting (W8A8sym)",
        )
    return IntegerProduct.of(layer)


def _for_few_tokens(layer: PackedLinear) -> FixedPointWeights | Int4Weights | None:
    """What multiplies with the codes as they are: our own kernel, or torch's operator where there is none."""
    if layer.bits != 4 or layer.axis != "oc":
        return None
    if native.unavailable() is None:
        return FixedPointWeights.of(layer)
    fits = layer.group_size in _INT4_GROUPS and layer.out_features % 16 == 0
    return Int4Weights.of(layer) if fits else None


def has_bf16_units() -> bool:
    return bool({"amx_bf16", "avx512_bf16"} & set(cpu()["flags"]))


@functools.cache
def exact_with_bytes() -> bool:
    """Whether the integer operator is exact at the ends of both ranges; found out by trying."""
    ends = torch.tensor([[127, -128], [-128, -128], [127, 127]], dtype=torch.int8).repeat_interleave(32, 1).contiguous()
    x = torch.full((2, 64), 255, dtype=torch.uint8)
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    y = qlinear(x, torch.ops.onednn.qlinear_prepack(ends, None), ones, zeros)
    return bool(torch.equal(y.long(), x.long() @ ends.long().T))


def qlinear(
    codes: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> Float[torch.Tensor, "rows out"]:
    """uint8 [rows, in] times a prepacked int8 weight, by its scales: float32."""
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def _finished(y: Products, layer: PackedLinear, dtype: torch.dtype) -> Products:
    y = y if layer.bias is None else y + layer.bias.to(y.dtype)
    return y.to(dtype)
