"""Bit settings: ``W4A16g64``, ``W4A8``, ``W4A4KV4``, ``W2A16g64sym``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.errors import HarnessError

WEIGHT_BITS = (2, 3, 4, 8, 16)
ACTIVATION_BITS = (4, 8, 16)
KV_BITS = (4, 8, 16)
UNQUANTIZED = 16

_GRAMMAR = re.compile(
    r"W(?P<w>[0-9]{1,3})A(?P<a>[0-9]{1,3})(?:KV(?P<kv>[0-9]{1,3}))?(?:g(?P<g>[0-9]{1,9}))?(?P<sym>sym)?"
)
_FORM = "W<bits>A<bits>[KV<bits>][g<group>][sym], for example W4A16g64, W4A8, W4A4KV4"


@dataclass(frozen=True, order=True)
class Setting:
    """How many bits weights, activations and the KV cache have; 16 means not quantized.

    ``group_size`` is the number of weights that share a scale (None: one scale per output channel). Weights and
    activations are asymmetric unless ``symmetric``; activations are quantized per token, dynamically.
    """

    weight_bits: int = UNQUANTIZED
    activation_bits: int = UNQUANTIZED
    kv_bits: int = UNQUANTIZED
    group_size: int | None = None
    symmetric: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read ``W4A16g64``. Raises HarnessError that names the legal values."""
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise HarnessError(f"setting {text!r} is not understood", fix=f"write {_FORM}")
        setting = cls(
            weight_bits=int(match["w"]),
            activation_bits=int(match["a"]),
            kv_bits=int(match["kv"] or UNQUANTIZED),
            group_size=int(match["g"]) if match["g"] else None,
            symmetric=match["sym"] is not None,
        )
        for word, bits, legal in (
            ("weights", setting.weight_bits, WEIGHT_BITS),
            ("activations", setting.activation_bits, ACTIVATION_BITS),
            ("the KV cache", setting.kv_bits, KV_BITS),
        ):
            if bits not in legal:
                raise HarnessError(
                    f"setting {text!r}: {bits} bits for {word} is not offered",
                    fix=f"choose from {', '.join(map(str, legal))} (16 is: not quantized)",
                )
        if setting.group_size == 0:
            raise HarnessError(f"setting {text!r}: a group of 0 weights", fix="leave g out for one group per channel")
        if setting.weight_bits == UNQUANTIZED and setting.group_size:
            raise HarnessError(f"setting {text!r}: unquantized weights have no groups", fix="leave the g part out")
        return setting

    def __str__(self) -> str:
        return (
            f"W{self.weight_bits}A{self.activation_bits}"
            + (f"KV{self.kv_bits}" if self.kv_bits != UNQUANTIZED else "")
            + (f"g{self.group_size}" if self.group_size else "")
            + ("sym" if self.symmetric else "")
        )

    @property
    def quantizes_activations(self) -> bool:
        return self.activation_bits != UNQUANTIZED

    @property
    def quantizes_kv(self) -> bool:
        return self.kv_bits != UNQUANTIZED


FULL_PRECISION = Setting()
