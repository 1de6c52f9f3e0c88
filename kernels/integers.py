"""Products of integers on a CPU: ``tokens.c`` makes codes of activations, ``wna8.c`` multiplies them (which say how).

A layer is one buffer, whose header the kernel looks over at every call: sizes that do not fit are refused before
anything else is read. No operators of torch's: its dispatcher would take longer than a small product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, Int32, UInt8

from harness.errors import Unsupported
from harness.kernels.native import in_parts, library
from harness.kernels.pack import PackedLinear, unpack
from harness.kernels.watching import tell
from harness.quantizer import ActivationSpec

OPERATOR = "wna8_integer"

_MAGIC = int.from_bytes(b"WNA8", "little")
_PANEL, _QUAD, _TILE = 64, 4, 64  # outputs of a panel; inputs that lie side by side; inputs that channels are padded to
_TYPES = (torch.float32, torch.bfloat16)  # that codes are made of
_VALUES_OF_A_PART, _CODES_OF_A_PART = 1 << 18, 1 << 20  # for a thread of its own
_NO_MEMORY = 1  # of what the kernel returns; 0: all well, 2: no layer of these sizes


class Tokens(NamedTuple):
    """Activations as the kernel reads them: codes and zero points less 128, sums of such codes in every group."""

    codes: Int8[torch.Tensor, "tokens padded"]
    scales: Float[torch.Tensor, " tokens"]
    zeros: Int32[torch.Tensor, " tokens"]
    sums: Int32[torch.Tensor, "tokens groups"]


def group_of(layer: PackedLinear) -> int:
    """Inputs whose products are added up as integers; whole channels are padded."""
    return layer.in_features + -layer.in_features % _TILE if layer.whole_channels else layer.group_size


def encode(x: Float[torch.Tensor, "tokens in"], spec: ActivationSpec, group: int) -> Tokens:
    """The codes of :func:`harness.quantizer.encode_tokens`, bit for bit. A token with infinity in it has NaN for a
    scale, as one with NaN has. ``group``: as :func:`group_of` has it."""
    x = (x if x.dtype in _TYPES else x.float()).contiguous()
    tell("encode_tokens", x)
    tokens, inputs = x.shape
    groups = -(-inputs // group)
    codes, scales = torch.empty(tokens, groups * group, dtype=torch.int8), torch.empty(tokens)
    zeros, sums = torch.empty(tokens, dtype=torch.int32), torch.empty(tokens, groups, dtype=torch.int32)
    function, half, start = library().encode_tokens, x.dtype == torch.bfloat16, x.data_ptr()
    to = (codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), sums.data_ptr())

    def run(part: int, parts: int) -> None:
        first, last = tokens * part // parts, tokens * (part + 1) // parts
        function(start, inputs, half, spec.bits, spec.clip, spec.symmetric, group, groups, first, last, *to)

    in_parts(run, min(tokens, torch.get_num_threads(), 1 + tokens * inputs // _VALUES_OF_A_PART) or 1)
    return Tokens(codes, scales, zeros, sums)


def product(x: Tokens, layer: UInt8[torch.Tensor, " bytes"], outputs: int) -> Float[torch.Tensor, "tokens out"]:
    """Exact up to the conversion of a group's sum to float32.

    Raises ValueError for a buffer that holds no layer of these sizes, and for tensors of other types.
    """
    (tokens, padded), groups = x.codes.shape, x.sums.shape[1]
    if not x.scales.shape == x.zeros.shape == (tokens,) or x.sums.shape != (tokens, groups):
        raise ValueError(f"{OPERATOR} takes a scale, a zero point and sums for each token")
    tensors = (x.codes, x.scales, x.zeros, x.sums, layer)
    types = (torch.int8, torch.float32, torch.int32, torch.int32, torch.uint8)
    if tuple(tensor.dtype for tensor in tensors) != types or not all(
        tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors
    ):
        raise ValueError(f"{OPERATOR} takes tensors of {types}, contiguous, on a CPU")
    tell(OPERATOR, x.codes, layer)
    y = torch.empty(tokens, outputs)
    function, here, bytes_ = library().wna8, layer.data_ptr(), layer.numel()
    of_tokens = (x.codes.data_ptr(), padded, x.scales.data_ptr(), x.zeros.data_ptr(), x.sums.data_ptr(), groups)
    to = y.data_ptr()

    def run(part: int, parts: int) -> int:
        return int(function(here, bytes_, *of_tokens, to, outputs, tokens, part, parts))

    ends = in_parts(run, min(torch.get_num_threads(), 1 + tokens * padded * outputs // _CODES_OF_A_PART))
    if _NO_MEMORY in ends:
        raise MemoryError(f"{OPERATOR} had no memory for {padded} inputs")
    if any(ends):
        raise ValueError(f"{OPERATOR}: the buffer holds no layer of {outputs} × {padded} in {groups} groups")
    return y


def buffer_of(layer: PackedLinear) -> UInt8[torch.Tensor, " bytes"]:
    """A layer of at most 8 bits, axis ``oc``, as the kernel reads it: codes of 2 bits in 4.

    Raises Unsupported where a group's products might not fit into 32 bits.
    """
    linear = unpack(layer)
    (out, inputs), groups, group = linear.codes.shape, linear.scales.shape[1], group_of(layer)
    bits = 4 if layer.bits <= 4 else 8
    if group > (most := (2**31 - 1) // (255 * (2**bits - 1))):
        raise Unsupported(
            f"sums of {group} products of {bits} and 8 bits are more than 32 bits hold",
            fix=f"groups of {most} at the most",
        )
    header = torch.tensor([_MAGIC, out, inputs, groups, group, bits, 0, 0])
    zeros = linear.zeros.to(torch.int32)
    sums = linear.codes.reshape(out, groups, -1).sum(2, dtype=torch.int32) - zeros * (inputs // groups)
    bias = torch.zeros(out) if linear.bias is None else linear.bias.float()
    grids = (linear.scales.float(), sums, zeros, bias[:, None])
    parts = (header, _in_quads(linear.codes, groups * group, bits), *map(_in_lanes, grids))
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def _in_quads(codes: UInt8[torch.Tensor, "out in"], padded: int, bits: int) -> UInt8[torch.Tensor, "panels lines 64 4"]:
    out, inputs = codes.shape
    codes = torch.nn.functional.pad(codes, (0, padded - inputs, 0, -out % _PANEL))
    quads = codes.reshape(-1, _PANEL, padded // _QUAD, _QUAD).transpose(1, 2)
    return quads if bits == 8 else quads[:, 0::2] | quads[:, 1::2] << 4


def _in_lanes(grid: torch.Tensor) -> torch.Tensor:
    """From [out, groups] to [panels, groups, 64]."""
    out, groups = grid.shape
    padded = torch.nn.functional.pad(grid, (0, 0, 0, -out % _PANEL))
    return padded.reshape(-1, _PANEL, groups).transpose(1, 2)
