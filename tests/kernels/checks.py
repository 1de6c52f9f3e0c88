"""What each Triton kernel must compute, against float64 and integer references. ``launch`` is the module under test."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from layers import random_layer

from harness.kernels.configs import Config
from harness.kernels.pack import pack
from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec, encode_tokens
from harness.transform import BlockRotation, InputTransform, Permutation

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def close(y: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int, ulps: float = 1.0) -> None:
    """Within the rounding of ``terms`` float32 additions of the given total magnitude, and of the output type."""
    bound = 4 * 2.0**-24 * terms**0.5 * magnitude + ulps * 2 * EPSILON.get(y.dtype, 2.0**-24) * exact.abs()
    excess = (y.double() - exact).abs() - bound
    assert excess.max() <= 1e-7, f"off by {excess.max():.3g} beyond the bound"


def rows(count: int, inputs: int, seed: int) -> torch.Tensor:
    """Activations as they occur: one row of zeros, one outlier channel, values midway between two levels."""
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))
    x[:, inputs // 3] *= 20
    if count > 2:
        x[1] = 0
        x[2] = torch.arange(inputs) % 31 - 15.5  # range 30 at the most: midway between levels at 4 bits
    return x


def weight_only(launch: ModuleType, count: int, config: Config, dtype: torch.dtype, seed: int = 0, **kind: Any) -> None:
    """The weight-only kernels, whose weights are rounded as the simulation's are."""
    linear = random_layer(seed=seed, **kind)
    x = rows(count, linear.codes.shape[1], seed).to(dtype)
    y = launch.weight_only(x, pack(linear), config)
    assert y.dtype == dtype and y.shape == (count, linear.codes.shape[0])
    weight = linear.weight().to(dtype).double()
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if linear.bias is not None:
        exact, magnitude = exact + linear.bias, magnitude + linear.bias.abs()
    if dtype == torch.bfloat16:  # the interpreter cuts bits off where a GPU rounds to bfloat16: weights and output
        assert ((y.double() - exact).abs() <= 2 * 2.0**-7 * magnitude).all()
    else:
        close(y, exact, magnitude, x.shape[1])


def integer(launch: ModuleType, count: int, config: Config, spec: ActivationSpec, seed: int = 0, **kind: Any) -> None:
    """Quantized activations, then the integer product: the same bits as integer arithmetic gives."""
    linear = random_layer(seed=seed, activation=spec, **kind)
    packed = pack(linear)
    x = rows(count, linear.codes.shape[1], seed)
    quantized = launch.quantize_rows(x, spec, packed)
    _same_rows(quantized, x, spec, linear)
    y = launch.integer(quantized, packed, config, torch.float32)
    assert torch.equal(y, exact_product(x, spec, linear))


def rotation(
    launch: ModuleType, count: int, blocks: int, size: int, spec: ActivationSpec | None, config: Config,
    *, fused: bool, steps: int, smooth: bool, seed: int = 0,
) -> None:  # fmt: skip
    """The online transform in float16, then the codes, which may differ by one where rounding did."""
    generator = torch.Generator().manual_seed(seed)
    inputs = blocks * size

    def turn() -> BlockRotation:
        return BlockRotation(torch.linalg.qr(torch.randn(size, size, generator=generator))[0])

    parts = (turn(), Permutation(torch.randperm(inputs, generator=generator)), turn())[:steps]
    divisors = torch.rand(inputs, generator=generator) + 0.5 if smooth else None
    transform = InputTransform(divisors, parts)
    x = torch.randn(count, inputs, generator=generator).half()
    packed = pack(random_layer(64, inputs, activation=spec, transform=transform))
    exact = transform.apply(x.double().float())
    rotations = launch.Rotations.of(transform, torch.float16)
    given = (x, rotations) if fused or steps < 3 else (launch.rotate_permute(x, rotations), rotations.rest)
    turned = launch.rotate(*given, config)
    if spec is None:
        assert ((turned.float() - exact).abs() <= 2e-3 * exact.abs().amax(1, keepdim=True)).all()
        return
    result = launch.rotate_quantize(*given, spec, packed, config)
    alone = launch.quantize_rows(turned, spec, packed)
    assert torch.equal(result.codes, alone.codes) and torch.equal(result.scales, alone.scales)
    codes, scale, zero = encode_tokens(exact, spec)
    half = 2 ** (spec.bits - 1)
    # From the zero point on: where that rounds the other way, all codes move with it.
    levels = result.codes[:, :inputs].int() - result.zeros.reshape(-1, 1)
    off = (levels - (codes.int() - zero.int())).abs()
    assert off.max() <= 1 and off.sum() <= 3 + (0.02 if spec.bits == 4 else 0.2) * off.numel()
    assert torch.allclose(result.scales, scale[:, 0], rtol=4e-3)
    assert (result.zeros - (zero[:, 0].int() - half)).abs().max() <= 1
    assert torch.equal(result.row_sums[:, 0], result.codes.sum(1, dtype=torch.int32))


def exact_product(x: torch.Tensor, spec: ActivationSpec, linear: QuantizedLinear) -> torch.Tensor:
    """Σ (x − zx)(w − zw) per group in int64, then float32 in the kernel's order: group scales, row scale, bias."""
    codes, scale, zero = encode_tokens(x, spec)
    left = codes.long() - zero.long()
    groups = linear.scales.shape[1]
    right = linear.codes.long() - linear.zeros.long().repeat_interleave(linear.group_size, 1)
    total = torch.zeros(len(x), len(right))
    for g, (a, b) in enumerate(zip(left.chunk(groups, 1), right.chunk(groups, 1), strict=True)):
        total += (a @ b.T).float() * linear.scales[:, g].float()
    total *= scale
    return total if linear.bias is None else total + linear.bias


def _same_rows(quantized: Any, x: torch.Tensor, spec: ActivationSpec, linear: QuantizedLinear) -> None:
    codes, scale, zero = encode_tokens(x, spec)
    half, inputs = 2 ** (spec.bits - 1), x.shape[1]
    signed = codes.int() - half
    assert torch.equal(quantized.codes[:, :inputs].int(), signed)
    assert not quantized.codes[:, inputs:].any()
    assert torch.equal(quantized.scales, scale[:, 0])
    assert torch.equal(quantized.zeros, zero[:, 0].int() - half)
    groups = linear.scales.shape[1]
    assert torch.equal(quantized.row_sums, signed.reshape(len(x), groups, -1).sum(2, dtype=torch.int32))
