"""The Triton kernels as functions of tensors: on a GPU, or on CPU tensors under Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float, Int, Int8, Int32

from harness.errors import Unsupported
from harness.kernels.configs import Config
from harness.kernels.gpu.act_quant import act_quant_kernel
from harness.kernels.gpu.rotate import rotate_permute_kernel, rotate_quantize_kernel
from harness.kernels.gpu.wna8 import wna8_kernel
from harness.kernels.gpu.wna16 import wna16_kernel
from harness.kernels.gpu.wna16_gemv import wna16_gemv_kernel
from harness.kernels.pack import TILE_IN, PackedLinear
from harness.kernels.watching import start
from harness.quantizer import ActivationSpec
from harness.transform import BlockRotation, InputTransform, Permutation

HALVES = (torch.float16, torch.bfloat16)
"""Types that rotations and weight-only products are computed in."""
_CHUNK = 2048  # channels of a row that are quantized at a time
_ROTATED = (16, 32, 64, 128)  # channels of a block; a tensor core's product has 16 or more


@dataclass(frozen=True)
class QuantizedRows:
    """Activations as the integer kernel reads them: codes less 2^(bits−1), padded with zeros; the sums per group."""

    codes: Int8[torch.Tensor, "rows padded"]
    scales: Float[torch.Tensor, " rows"]
    zeros: Int[torch.Tensor, " rows"]
    row_sums: Int[torch.Tensor, "rows groups"]


def refuse(layer: PackedLinear) -> None:
    """Raises Unsupported for a layer that no kernel runs, as the functions below do once there are activations."""
    if layer.integers:
        _group_of_integers(layer)
    else:
        _refuse_bits(layer)
    if layer.transform is not None and layer.transform.steps:
        _steps(layer.transform)


def weight_only(x: Float[torch.Tensor, "rows in"], layer: PackedLinear, config: Config) -> torch.Tensor:
    """``x Wᵀ + b`` in x's type, float16 or bfloat16, weights dequantized on the way.

    Raises Unsupported for 8-bit codes, other types, and layers that are packed for an integer product.
    """
    if layer.integers:
        raise Unsupported("packed in bytes, for an integer product", fix="pack it without an activation spec")
    _refuse_bits(layer)
    if x.dtype not in HALVES:
        raise Unsupported(f"no weight-only kernel for {x.dtype}", fix="half precision")
    rows, split = x.shape[0], config.split_k
    gemv = config.block_m < 16  # a tensor core's product has 16 rows or more
    if gemv and rows > config.block_m:
        raise ValueError(f"{rows} rows in blocks of {config.block_m}: that kernel has one block of them")
    if layer.axis == "ic" and not layer.whole_channels and layer.group_size % config.block_n:
        raise ValueError(f"blocks of {config.block_n} outputs run across groups of {layer.group_size}")
    _refuse_beyond_int32(split * rows, max(layer.padded_in, layer.padded_out))
    x = _by_rows(x)
    tiles_in = layer.padded_in // TILE_IN
    bias = layer.bias if layer.bias is not None and split == 1 else None
    shape, dtype = ((rows, layer.out_features), x.dtype) if split == 1 else ((split, rows, layer.out_features), None)
    y = x.new_empty(shape, dtype=dtype or torch.float32)
    zeros = layer.zeros if layer.zeros is not None else layer.qweight
    limited = config if x.dtype == torch.float16 else config.unlimited
    grid = (triton.cdiv(layer.out_features, config.block_n), triton.cdiv(rows, config.block_m), split)
    start(
        wna16_gemv_kernel if gemv else wna16_kernel, grid,
        x, layer.qweight, layer.scales, zeros, x if bias is None else bias, y,
        rows, layer.out_features, layer.in_features, tiles_in, triton.cdiv(tiles_in, split), layer.padded_out,
        x.stride(0),
        BITS=layer.bits, GROUP=0 if layer.whole_channels else layer.group_size, PER_INPUT=layer.axis == "ic",
        ASYMMETRIC=layer.zeros is not None, HAS_BIAS=bias is not None,
        EVEN_K=layer.in_features % TILE_IN == 0,
        WIDEN=_widened(x), PTX=x.is_cuda and torch.version.hip is None,
        BM=config.block_m, BN=config.block_n, **limited.options,
    )  # fmt: skip
    if split == 1:
        return y
    total = y.sum(0)  # partial sums, added in one order: the same bits every time
    return (total if layer.bias is None else total + layer.bias.float()).to(x.dtype)


def integer(x: QuantizedRows, layer: PackedLinear, config: Config, dtype: torch.dtype) -> torch.Tensor:
    """``x Wᵀ + b`` of the values that the codes of both stand for, [rows, out] in ``dtype``, from an int8 product.

    Raises Unsupported for layers that are packed for a half-precision product, and for groups other than whole
    channels, 128, and multiples of a strip that divide it.
    """
    if not layer.integers:
        raise Unsupported("packed in 16-bit words, for a half-precision product", fix="run it as a weight-only product")
    group = _group_of_integers(layer)
    rows = x.codes.shape[0]
    _refuse_beyond_int32(rows, max(layer.padded_in, layer.padded_out))
    y = torch.empty(rows, layer.out_features, dtype=dtype, device=x.codes.device)
    grid = (triton.cdiv(layer.out_features, config.block_n), triton.cdiv(rows, config.block_m))
    start(
        wna8_kernel, grid,
        x.codes, x.scales, x.zeros, x.row_sums, layer.qweight.view(torch.int8), layer.scales,
        layer.zeros if layer.zeros is not None else layer.scales, layer.code_sums,
        layer.bias if layer.bias is not None else x.scales, y,
        rows, layer.out_features, layer.in_features, layer.padded_in // TILE_IN, layer.scales.shape[0],
        layer.padded_out,
        BITS=layer.bits, GROUP=group, ASYMMETRIC=layer.zeros is not None, HAS_BIAS=layer.bias is not None,
        PTX=x.codes.is_cuda and torch.version.hip is None, BM=config.block_m, BN=config.block_n, **config.options,
    )  # fmt: skip
    return y


def quantize_rows(x: Float[torch.Tensor, "rows in"], spec: ActivationSpec, layer: PackedLinear) -> QuantizedRows:
    """Each row of ``x`` quantized for an integer product with ``layer``. Raises Unsupported as :func:`integer` does."""
    _group_of_integers(layer)
    _refuse_beyond_int32(*x.shape)
    x = _by_rows(x)
    out, group = _empty_rows(x, layer)
    chunk = min(triton.next_power_of_2(layer.padded_in), _CHUNK)
    start(
        act_quant_kernel, (x.shape[0],),
        x, out.codes, out.scales, out.zeros, out.row_sums, x.shape[0], layer.in_features, layer.padded_in,
        out.row_sums.shape[1], spec.clip, x.stride(0),
        BITS=spec.bits, SYMMETRIC=spec.symmetric, GROUP=group, BM=1, CHUNK=chunk, num_warps=max(1, chunk // 256),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Rotations:
    """An online transform as the kernels read it, in one half precision; ``targets``: where each channel goes."""

    smooth: Float[torch.Tensor, " in"] | None
    first: Float[torch.Tensor, "b b"]
    targets: Int32[torch.Tensor, " in"] | None
    second: Float[torch.Tensor, "b b"] | None

    @classmethod
    def of(cls, transform: InputTransform, dtype: torch.dtype) -> Rotations:
        """Raises Unsupported for a transform that is not rotation[, permutation[, rotation]]."""
        first, permutation, second = _steps(transform)
        return cls(
            None if transform.smooth is None else transform.smooth.to(dtype).contiguous(),
            first.matrix.to(dtype).contiguous(),
            None if permutation is None else permutation.targets.to(torch.int32),
            None if second is None else second.matrix.to(dtype).contiguous(),
        )

    @property
    def rest(self) -> Rotations:
        """What is left of two rotations after the permutation."""
        assert self.second is not None
        return Rotations(None, self.second, None, None)


def rotate(x: Float[torch.Tensor, "rows in"], rotations: Rotations, config: Config) -> Float[torch.Tensor, "rows in"]:
    """The online transform."""
    return _rotate(x, rotations, config, None)


def rotate_quantize(
    x: Float[torch.Tensor, "rows in"], rotations: Rotations, spec: ActivationSpec, layer: PackedLinear, config: Config
) -> QuantizedRows:
    """:func:`rotate`, and what :func:`quantize_rows` makes of it, at once."""
    _group_of_integers(layer)
    quantized, group = _empty_rows(x, layer)
    _rotate(x, rotations, config, (quantized, group, spec))
    return quantized


def _rotate(
    x: torch.Tensor, rotations: Rotations, config: Config, quantizing: tuple[QuantizedRows, int, ActivationSpec] | None
) -> torch.Tensor:
    """The rotated rows; ``quantizing``: their codes too, into the rows given, with sums for a group."""
    _refuse_beyond_int32(*x.shape)
    x = _by_rows(x)
    (rows, inputs), size = x.shape, rotations.first.shape[0]
    y = x.new_empty(x.shape)
    twice = rotations.second is not None
    out, group, spec = quantizing or (None, 0, ActivationSpec(8))
    start(
        rotate_quantize_kernel, (triton.cdiv(rows, config.block_m),),
        x, x if rotations.smooth is None else rotations.smooth, rotations.first,
        x if rotations.targets is None else rotations.targets, rotations.second if twice else x,
        x.new_empty(x.shape) if twice else y, y,
        *((out.codes, out.scales, out.zeros, out.row_sums) if out else (y, y, y, y)),
        rows, inputs, out.codes.shape[1] if out else inputs, out.row_sums.shape[1] if out else 1, spec.clip,
        x.stride(0),
        B=size, HAS_SMOOTH=rotations.smooth is not None, PERMUTES=rotations.targets is not None, ROTATES_TWICE=twice,
        QUANTIZES=out is not None, BITS=spec.bits, SYMMETRIC=spec.symmetric, GROUP=group, WIDEN=_widened(x),
        BM=config.block_m, CHUNK=config.block_n, **config.options,
    )  # fmt: skip
    return y


def rotate_permute(x: Float[torch.Tensor, "rows in"], rotations: Rotations) -> Float[torch.Tensor, "rows in"]:
    """The transform up to its permutation, in blocks of rows that need not fit anywhere; ``rotations.rest`` is left."""
    _refuse_beyond_int32(*x.shape)
    x = _by_rows(x)
    (rows, inputs), size = x.shape, rotations.first.shape[0]
    y = x.new_empty(x.shape)
    start(
        rotate_permute_kernel, (triton.cdiv(rows, 16), inputs // size),
        x, x if rotations.smooth is None else rotations.smooth, rotations.first, rotations.targets, y,
        rows, inputs, x.stride(0),
        B=size, HAS_SMOOTH=rotations.smooth is not None, WIDEN=_widened(x), BM=16, num_warps=4,
    )  # fmt: skip
    return y


def _widened(x: torch.Tensor) -> bool:
    """Under the interpreter, which multiplies the bits of bfloat16."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _by_rows(x: Float[torch.Tensor, "rows in"]) -> Float[torch.Tensor, "rows in"]:
    """The kernels step along a row one value at a time."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuse_beyond_int32(rows: int, width: int) -> None:
    if rows * width >= 2**31:
        raise Unsupported(f"{rows} rows of {width} are more than the kernels can count", fix="fewer tokens at a time")


def _refuse_bits(layer: PackedLinear) -> None:
    if layer.bits not in (2, 4):
        raise Unsupported(f"no weight-only kernel for {layer.bits} bits", fix="2 or 4 bits")


def _group_of_integers(layer: PackedLinear) -> int:
    """Inputs in a group, 0 for a whole row."""
    group = 0 if layer.whole_channels else layer.group_size
    if group > TILE_IN or group % (16 * layer.bits):
        legal = " or ".join(str(size) for size in (64, 128) if size % (16 * layer.bits) == 0)
        raise Unsupported(
            f"no kernel multiplies {layer.bits}-bit integers in groups of {group}",
            fix=f"groups of {legal}, or whole channels",
        )
    return group


def _empty_rows(x: torch.Tensor, layer: PackedLinear) -> tuple[QuantizedRows, int]:
    """Room for the quantized rows of ``x``, and the group whose sums the layer needs (0: the whole row)."""
    rows, groups = x.shape[0], layer.scales.shape[0] if layer.axis == "oc" else 1
    rows_out = QuantizedRows(
        x.new_empty(rows, layer.padded_in, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty(rows, groups, dtype=torch.int32),
    )
    return rows_out, 0 if groups == 1 else layer.group_size


def _steps(transform: InputTransform) -> tuple[BlockRotation, Permutation | None, BlockRotation | None]:
    for size in (step.matrix.shape[0] for step in transform.steps if isinstance(step, BlockRotation)):
        if size not in _ROTATED:
            raise Unsupported(
                f"no kernel rotates blocks of {size} inputs", fix=f"blocks of {', '.join(map(str, _ROTATED))}"
            )
    match transform.steps:
        case (BlockRotation() as first,):
            return first, None, None
        case (BlockRotation() as first, Permutation() as permutation):
            return first, permutation, None
        case (BlockRotation() as first, Permutation() as permutation, BlockRotation() as second) if (
            second.matrix.shape == first.matrix.shape
        ):
            return first, permutation, second
    names = ", ".join(type(step).__name__ for step in transform.steps)
    raise Unsupported(
        f"no kernel for the input transform {names or 'of smoothing alone'}", fix="rotate, permute, rotate"
    )
