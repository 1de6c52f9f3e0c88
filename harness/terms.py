"""Whether what a method hands back is what its setting asks for: then only is it scored under that setting's name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from harness.attention import AttentionSpec, head_size
from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec
from harness.settings import UNQUANTIZED, Setting

_ORTHOGONAL = 1e-3


def linear_faults(linear: QuantizedLinear, setting: Setting) -> Iterator[str]:
    """What of ``linear`` is not as ``setting`` asks: bits, groups, symmetry, activations."""
    along = linear.codes.shape[1] if linear.axis == "oc" else linear.codes.shape[0]
    if setting.weight_bits != UNQUANTIZED and linear.bits != setting.weight_bits:
        yield f"{linear.bits}-bit codes"
    if linear.group_size != (setting.group_size or along):
        yield f"groups of {linear.group_size}, not {setting.group_size or along}"
    if setting.symmetric and (linear.zeros != 2 ** (linear.bits - 1)).any():
        yield "zero points other than the middle"
    yield from _activation_faults(linear.activation, ActivationSpec.of(setting), "activations")


def attention_faults(spec: AttentionSpec, setting: Setting, module: nn.Module) -> Iterator[str]:
    """What of ``spec`` is not as ``setting`` asks, or changes the scores of ``module`` in full precision."""
    wanted = ActivationSpec(setting.kv_bits, setting.symmetric) if setting.quantizes_kv else None
    yield from _activation_faults(spec.kv, wanted, "keys and values")
    if spec.rotation is None:
        return
    if spec.rotation.shape != (head_size(module),) * 2:
        yield f"a rotation of {list(spec.rotation.shape)} for heads of {head_size(module)}"
    elif (off := off_orthogonal(spec.rotation)) is not None:
        yield f"a rotation of queries and keys that is not orthogonal: R Rᵀ is off by {off:.2g}"


def _activation_faults(got: ActivationSpec | None, wanted: ActivationSpec | None, what: str) -> Iterator[str]:
    if got is None or wanted is None:
        if got is not wanted:
            yield f"{what} {got}, not {wanted}"
        return
    if (got.bits, got.symmetric) != (wanted.bits, wanted.symmetric):
        yield f"{what} {got}, not {wanted}"
    if not 0 < got.clip <= 1:
        yield f"{what} clipped to {got.clip} of their range"


def off_orthogonal(matrix: torch.Tensor) -> float | None:
    """By how much R Rᵀ differs from the identity; None where that is only rounding."""
    off = float((matrix.double() @ matrix.double().T - torch.eye(len(matrix), device=matrix.device)).abs().max())
    return None if off <= _ORTHOGONAL else off  # NaN is off, too
