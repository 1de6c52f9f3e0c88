"""The packed format that every kernel reads: codes in tiles of 64 outputs × 128 inputs, scales, zero points.

A tile row holds 128 codes in ``16 · bits`` bytes, in words as wide as the numbers that a code is multiplied as: bytes
in front of an integer product, 16 bits in front of a half-precision one. Word ``j`` has the code of input ``j`` in its
lowest bits, that of input ``j + L`` above it, and so on in strips of ``L`` consecutive inputs, L the words of a row: a
strip is unpacked with one shift and one mask, each code in the place of its word, so that it is at once where the
product wants it; it stays contiguous beside the activations it is multiplied with. Codes are stored as two's complement
(code − 2^(bits−1)): shifted to the top of a byte, a field is the signed code times 2^(8−bits) and goes into an integer
dot as it is. Layers are padded with zeros to whole tiles.

Zero points are words too: Triton lays an operand out by the narrowest load that it depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Float16, Int16, Int32, UInt8

from harness.errors import Unsupported
from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec, Axis
from harness.transform import InputTransform

TILE_OUT, TILE_IN = 64, 128
PACKED_BITS = (2, 4, 8)


@dataclass(frozen=True)
class PackedLinear:
    """One linear layer as the kernels read it.

    ``qweight``: tiles [out / 64, in / 128, 64, words], padded; bytes for an integer product, else 16-bit words.
    ``scales`` and ``zeros`` (unsigned, as the codes; None: all 2^(bits−1)) are [groups, out] for axis ``oc`` and
    [groups, in] for ``ic``, not padded.
    """

    qweight: UInt8[torch.Tensor, "tiles_out tiles_in 64 words"] | Int16[torch.Tensor, "tiles_out tiles_in 64 words"]
    scales: Float16[torch.Tensor, "groups channels"]
    zeros: UInt8[torch.Tensor, "groups channels"] | Int16[torch.Tensor, "groups channels"] | None
    bits: int
    group_size: int
    axis: Axis
    out_features: int
    in_features: int
    bias: Float[torch.Tensor, " out"] | None = None
    activation: ActivationSpec | None = None
    transform: InputTransform | None = None

    @property
    def padded_in(self) -> int:
        return self.qweight.shape[1] * TILE_IN

    @property
    def padded_out(self) -> int:
        return self.qweight.shape[0] * TILE_OUT

    @property
    def integers(self) -> bool:
        """Packed for an integer product. Scales along the inputs cannot leave one: such a layer is multiplied in half
        precision, whatever its activations."""
        return self.qweight.dtype == torch.uint8

    @property
    def whole_channels(self) -> bool:
        """One scale for each output (``oc``) or input (``ic``) channel."""
        return self.scales.shape[0] == 1

    @cached_property
    def code_sums(self) -> Int32[torch.Tensor, "groups out"]:
        """Sums of the signed codes of each group along the inputs: what a zero point of the input is multiplied by."""
        signed = signed_codes(self).to(torch.int32)
        return signed.reshape(self.out_features, -1, self.group_size).sum(2, dtype=torch.int32).T.contiguous()

    def to(self, device: torch.device | str) -> PackedLinear:
        """The same layer with its tensors on ``device``."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            qweight=self.qweight.to(device),
            scales=self.scales.to(device),
            zeros=moved(self.zeros),
            bias=moved(self.bias),
            transform=None if self.transform is None else self.transform.to(device),
        )


def on_device(layers: Mapping[str, PackedLinear], device: torch.device) -> dict[str, PackedLinear]:
    """The same layers with their tensors on ``device``; transforms are shared as they were."""
    transforms = {id(t): t.to(device) for layer in layers.values() if (t := layer.transform) is not None}
    return {
        name: replace(replace(layer, transform=None).to(device), transform=transforms.get(id(layer.transform)))
        for name, layer in layers.items()
    }


def unpackable(bits: int, group_size: int, length: int, axis: Axis) -> str | None:
    """Why a layer cannot be packed, or None. ``length``: of the dimension that the groups lie along."""
    if bits not in PACKED_BITS:
        return f"no packed format for {bits}-bit codes (there is one for {', '.join(map(str, PACKED_BITS))})"
    if group_size == length:
        return None
    if axis == "oc" and (group_size % TILE_IN == 0 or (TILE_IN % group_size == 0 and group_size >= 32)):
        return None
    if axis == "ic" and group_size % TILE_OUT == 0:
        return None
    legal = "32, 64 or multiples of 128 inputs" if axis == "oc" else "multiples of 64 outputs"
    return f"groups of {group_size} do not fit the tiles: {legal}, or whole channels"


def pack(linear: QuantizedLinear) -> PackedLinear:
    """The layer in tiles. Raises Unsupported for bits or groups that the tiles do not hold."""
    out, inputs = linear.codes.shape
    length = inputs if linear.axis == "oc" else out
    if reason := unpackable(linear.bits, linear.group_size, length, linear.axis):
        raise Unsupported(reason, fix="choose 2, 4 or 8 bits and groups of 64 or 128")
    symmetric = bool((linear.zeros == 2 ** (linear.bits - 1)).all())
    word = torch.uint8 if linear.activation is not None and linear.axis == "oc" else torch.int16
    return PackedLinear(
        qweight=_to_tiles(linear.codes ^ (1 << (linear.bits - 1)), linear.bits, word),
        scales=_turned(linear.scales, linear.axis),
        zeros=None if symmetric else _turned(linear.zeros, linear.axis).to(word),
        bits=linear.bits,
        group_size=linear.group_size,
        axis=linear.axis,
        out_features=out,
        in_features=inputs,
        bias=linear.bias,
        activation=linear.activation,
        transform=linear.transform,
    )


def unpack(packed: PackedLinear) -> QuantizedLinear:
    """The inverse of :func:`pack`, exact."""
    half = 2 ** (packed.bits - 1)
    zeros = torch.full_like(packed.scales, half, dtype=torch.uint8) if packed.zeros is None else packed.zeros
    return QuantizedLinear(
        codes=_fields(packed) ^ half,
        scales=_turned(packed.scales, packed.axis),
        zeros=_turned(zeros, packed.axis).to(torch.uint8),
        bits=packed.bits,
        group_size=packed.group_size,
        axis=packed.axis,
        bias=packed.bias,
        activation=packed.activation,
        transform=packed.transform,
    )


def signed_codes(packed: PackedLinear) -> torch.Tensor:
    """int8 [out, in]: the codes less 2^(bits−1)."""
    shift = 8 - packed.bits
    return (_fields(packed) << shift).view(torch.int8) >> shift


def _turned(grid: torch.Tensor, axis: Axis) -> torch.Tensor:
    """From [out, groups] to [groups, out] and back for ``oc``; ``ic`` lies as the kernels read it."""
    return grid.T.contiguous() if axis == "oc" else grid.contiguous()


def _to_tiles(fields: UInt8[torch.Tensor, "out in"], bits: int, word: torch.dtype) -> torch.Tensor:
    """[out / 64, in / 128, 64, words]."""
    out, inputs = fields.shape
    padded = torch.nn.functional.pad(fields, (0, -inputs % TILE_IN, 0, -out % TILE_OUT)).to(word)
    strips = 8 * word.itemsize // bits
    tiles = padded.reshape(padded.shape[0] // TILE_OUT, TILE_OUT, padded.shape[1] // TILE_IN, strips, TILE_IN // strips)
    packed = torch.zeros_like(tiles[:, :, :, 0])
    for strip in range(strips):
        packed |= tiles[:, :, :, strip] << (bits * strip)
    return packed.transpose(1, 2).contiguous()


def _fields(packed: PackedLinear) -> UInt8[torch.Tensor, "out in"]:
    """The stored bits of every code, [out, in], without the padding."""
    bits, mask = packed.bits, 2**packed.bits - 1
    rows = packed.qweight.transpose(1, 2)
    fields = [((rows >> at) & mask).to(torch.uint8) for at in range(0, 8 * rows.element_size(), bits)]
    whole = torch.stack(fields, dim=3).reshape(packed.padded_out, packed.padded_in)
    return whole[: packed.out_features, : packed.in_features].contiguous()
