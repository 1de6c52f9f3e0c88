"""W4A16 with activations in 16-bit fixed point: ``w4a16.c`` (which says how) on tensors.

It takes a layer as one buffer, whose header the kernel looks over at every call: sizes that do not fit are refused
before anything else is read. No operator of torch's: its dispatcher would take longer than a small product.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, UInt8

from harness.kernels.native import in_parts, library
from harness.kernels.pack import PackedLinear, unpack
from harness.kernels.watching import tell

OPERATOR = "w4a16_fixed_point"
TYPES = (torch.float32, torch.bfloat16)  # of activations; the result has theirs
BLOCKS = (128, 64, 32)  # inputs that share a step

_MAGIC = int.from_bytes(b"W4A16", "little")
_LANES, _WORD = 16, 8  # outputs of a tile; codes of a 32-bit word
_CODES_OF_A_PART = 1 << 20  # for a thread of its own: starting one takes as long as some 10⁵ codes
_NO_MEMORY = 1  # of what the kernel returns; 0: all well, 2: no layer of these sizes


def buffer_of(layer: PackedLinear) -> UInt8[torch.Tensor, " bytes"]:
    """A layer of 4 bits, axis ``oc``, as the kernel reads it."""
    linear = unpack(layer)
    out, inputs = linear.codes.shape
    block, groups = block_of(layer), linear.scales.shape[1]
    header = torch.tensor([_MAGIC, out, inputs, -(-inputs // block), block, groups, 0, 0])
    bias = torch.zeros(out) if linear.bias is None else linear.bias.float()
    scales, zeros = _in_lanes(linear.scales), _in_lanes(linear.zeros)
    parts = (header, _in_words(linear.codes, block), _in_lanes(bias[:, None]), scales, zeros)
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def block_of(layer: PackedLinear) -> int:
    """A block lies within a group; whole channels are padded to blocks of 32 where nothing larger fits."""
    return next((size for size in BLOCKS if layer.group_size % size == 0), 32)


def _in_words(codes: UInt8[torch.Tensor, "out in"], block: int) -> Int32[torch.Tensor, "tiles words 16"]:
    out, inputs = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -inputs % block, 0, -out % _LANES)).to(torch.int32)
    tiles = padded.reshape(padded.shape[0] // _LANES, _LANES, padded.shape[1] // _WORD, _WORD).transpose(1, 2)
    words = torch.zeros(tiles.shape[:3], dtype=torch.int32)
    for at in range(_WORD):  # pairs of inputs lie in the two halves of a word, the first pair lowest
        words |= tiles[..., at] << (16 * (at % 2) + 4 * (at // 2))
    return words


def _in_lanes(grid: torch.Tensor) -> torch.Tensor:
    """From [out, groups] to [tiles, groups, 16]."""
    out, groups = grid.shape
    padded = torch.nn.functional.pad(grid, (0, 0, 0, -out % _LANES))
    return padded.reshape(-1, _LANES, groups).transpose(1, 2).contiguous()


def product(
    x: Float[torch.Tensor, "rows in"], layer: UInt8[torch.Tensor, " bytes"], outputs: int
) -> Float[torch.Tensor, "rows out"]:
    """Raises ValueError for a buffer that holds no layer of these sizes, and for tensors of other types."""
    if x.dtype not in TYPES or layer.dtype != torch.uint8 or not layer.is_contiguous() or x.is_cuda:
        raise ValueError(f"{OPERATOR} takes {TYPES} and a buffer of bytes, on a CPU")
    tell(OPERATOR, x, layer)
    x = x.contiguous()
    rows, inputs = x.shape
    y = torch.empty(rows, outputs, dtype=x.dtype)
    function = library().w4a16
    here, bytes_, there, at, half = layer.data_ptr(), layer.numel(), x.data_ptr(), y.data_ptr(), x.dtype != TYPES[0]

    def run(part: int, parts: int) -> int:
        return int(function(here, bytes_, there, inputs, at, outputs, rows, half, part, parts))

    ends = in_parts(run, min(torch.get_num_threads(), 1 + rows * inputs * outputs // _CODES_OF_A_PART))
    if _NO_MEMORY in ends:
        raise MemoryError(f"{OPERATOR} had no memory for {inputs} inputs")
    if any(ends):
        raise ValueError(f"{OPERATOR}: the buffer holds no layer of {outputs} × {inputs}")
    return y
