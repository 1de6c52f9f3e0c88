"""The format of compressed-tensors, ``pack-quantized``, as vLLM and transformers read it.

Its integers are signed and packed with 2^(bits−1) added, which makes the packed words those of unsigned codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.export.checkpoint import Finished, common_group, pack_words, refuse, weight_faults, write_folder
from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec

_BITS = (4, 8)


def write(finished: Finished, to: Path) -> None:
    """Raises Unsupported for cells with transforms, other groups, clipped activations or less than 4 bits."""
    linears = finished.quantized.linears
    refuse("compressed-tensors", finished.quantized, _faults)
    symmetric = all(bool((linear.zeros == 2 ** (linear.bits - 1)).all()) for linear in linears.values())
    tensors = finished.rest()
    for name, linear in linears.items():
        tensors |= {f"{name}.{part}": value for part, value in _tensors(linear, symmetric=symmetric).items()}
    others = [
        name
        for name, module in finished.model.module.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in linears
    ]
    first, group = next(iter(linears.values())), common_group(finished.quantized)
    write_folder(finished, to, tensors, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": others,
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",  # here too: else layers with quantized inputs are taken for "int-quantized"
            "weights": {
                "num_bits": first.bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                "strategy": "group" if group else "channel", "group_size": group,
            },
            "input_activations": _activation(first.activation),
            "output_activations": None,
        }},
    })  # fmt: skip


def _activation(spec: ActivationSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    return {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "strategy": "token", "dynamic": True}


def _faults(linear: QuantizedLinear) -> Iterator[str]:
    yield from weight_faults(linear, _BITS)
    if linear.activation is not None and linear.activation.clip != 1:
        yield "activations are clipped"
    if linear.activation is not None and linear.activation.symmetric:
        yield "symmetric activations have another scale there: 2·max|x| / (2^bits − 1) here"


def _tensors(linear: QuantizedLinear, *, symmetric: bool) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack_words(linear.codes, linear.bits),
        "weight_scale": linear.scales,
        "weight_shape": torch.tensor(linear.codes.shape, dtype=torch.int64),
    }
    if not symmetric:  # packed along the outputs
        tensors["weight_zero_point"] = pack_words(linear.zeros.T, linear.bits).T
    return tensors if linear.bias is None else tensors | {"bias": linear.bias}
