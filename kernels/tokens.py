"""What stands before and behind an integer product on a CPU: ``tokens.c`` on tensors, or torch without a compiler."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8

from harness.kernels import native
from harness.kernels.watching import tell
from harness.quantizer import ActivationSpec, encode_tokens

_TYPES = (torch.float32, torch.bfloat16)
_VALUES_OF_A_PART = 1 << 18  # for a thread of its own

Codes = UInt8[torch.Tensor, "tokens in"]
PerToken = Float[torch.Tensor, " tokens"]
Encoded = tuple[Codes, PerToken, PerToken]
"""Codes, scales and zero points of each token."""


def encode(x: Float[torch.Tensor, "tokens in"], spec: ActivationSpec) -> Encoded:
    """The bits of :func:`harness.quantizer.encode_tokens`, five times as fast. A token with infinity in it has
    NaN for a scale, as one with NaN has."""
    if native.unavailable() is not None or x.dtype not in _TYPES:
        codes, scale, zero = encode_tokens(x, spec)
        return codes, scale[:, 0], zero[:, 0]
    tell("encode_tokens", x)
    x = x.contiguous()
    tokens, inputs = x.shape
    codes = torch.empty(tokens, inputs, dtype=torch.uint8)
    scales, zeros = torch.empty(tokens), torch.empty(tokens)
    function, half = native.library().encode_tokens, x.dtype == torch.bfloat16
    start, to = x.data_ptr(), (codes.data_ptr(), scales.data_ptr(), zeros.data_ptr())

    def run(part: int, parts: int) -> None:
        first, last = tokens * part // parts, tokens * (part + 1) // parts
        function(start, inputs, half, spec.bits, spec.clip, spec.symmetric, first, last, *to)

    native.in_parts(run, _parts(tokens, inputs))
    return codes, scales, zeros


def finish(
    y: Float[torch.Tensor, "tokens out"],
    sums: Float[torch.Tensor, " out"],
    bias: Float[torch.Tensor, " out"] | None,
    scales: PerToken,
    zeros: PerToken,
) -> Float[torch.Tensor, "tokens out"]:
    """(y − zero · sums) · scale + bias, in place; all float32, ``y`` contiguous."""
    if native.unavailable() is not None:
        y.addr_(zeros, sums, alpha=-1).mul_(scales[:, None])
        return y if bias is None else y.add_(bias)
    tokens, outputs = y.shape
    function = native.library().finish_tokens
    operands = (sums.data_ptr(), None if bias is None else bias.data_ptr(), scales.data_ptr(), zeros.data_ptr())
    start = y.data_ptr()

    def run(part: int, parts: int) -> None:
        function(start, outputs, *operands, tokens * part // parts, tokens * (part + 1) // parts)

    native.in_parts(run, _parts(tokens, outputs))
    return y


def _parts(tokens: int, width: int) -> int:
    return min(tokens, torch.get_num_threads(), 1 + tokens * width // _VALUES_OF_A_PART) or 1
