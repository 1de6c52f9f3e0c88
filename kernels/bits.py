"""Codes of 2, 3, 4 or 8 bits, packed densely into bytes and back."""

from __future__ import annotations

import math

import torch
from jaxtyping import UInt8


def pack_bits(codes: UInt8[torch.Tensor, "*shape"], bits: int) -> UInt8[torch.Tensor, " packed"]:
    """The codes in row-major order, first code in the lowest bits; the last word is padded with zeros.

    Raises ValueError for codes that do not fit: their upper bits would be those of their neighbours.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    codes_per_word, bytes_per_word = _word(bits)
    flat = _padded(codes.flatten(), codes_per_word).reshape(-1, codes_per_word)
    word = flat[:, 0].to(_type(bytes_per_word), copy=True)
    for i in range(1, codes_per_word):
        word |= flat[:, i].to(word.dtype) << (i * bits)
    if bytes_per_word == 1:
        return word
    return torch.stack([(word >> (8 * j)) & 0xFF for j in range(bytes_per_word)], dim=1).to(torch.uint8).flatten()


def unpack_bits(
    packed: UInt8[torch.Tensor, " packed"], bits: int, shape: tuple[int, ...]
) -> UInt8[torch.Tensor, "*shape"]:
    """The inverse of :func:`pack_bits`."""
    codes_per_word, bytes_per_word = _word(bits)
    parts = packed.reshape(-1, bytes_per_word)
    word = parts[:, 0].to(_type(bytes_per_word))
    for j in range(1, bytes_per_word):
        word = word | (parts[:, j].to(word.dtype) << (8 * j))
    codes = torch.empty(len(parts), codes_per_word, dtype=torch.uint8, device=packed.device)
    for i in range(codes_per_word):
        codes[:, i] = (word >> (i * bits)) & (2**bits - 1)
    return codes.flatten()[: math.prod(shape)].reshape(shape)


def _padded(flat: UInt8[torch.Tensor, " n"], multiple: int) -> UInt8[torch.Tensor, " padded"]:
    missing = -flat.numel() % multiple
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest word that holds whole codes in whole bytes."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _type(bytes_per_word: int) -> torch.dtype:
    """That holds a word."""
    return torch.uint8 if bytes_per_word == 1 else torch.int32 if bytes_per_word < 4 else torch.int64
