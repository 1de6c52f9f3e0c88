"""The format of GPTQ checkpoints, as GPTQModel, vLLM and transformers read it.

The version that keeps zero points as they are (``gptq_v2``) is written: the older one stores them minus one and has no
place for a zero point of 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from harness.export.checkpoint import Finished, common_group, pack_words, refuse, weight_faults, write_folder
from harness.linear import QuantizedLinear

_BITS = (2, 4, 8)


def write(finished: Finished, to: Path) -> None:
    """Raises Unsupported for cells with quantized activations, transforms, other groups or 3 bits."""
    linears = finished.quantized.linears
    refuse("gptq", finished.quantized, _faults)
    first = next(iter(linears.values()))
    tensors = finished.rest()
    for name, linear in linears.items():
        tensors |= {f"{name}.{part}": value for part, value in _tensors(linear).items()}
    write_folder(finished, to, tensors, {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": first.bits,
        "group_size": common_group(finished.quantized) or -1,  # −1: a whole output channel
        "desc_act": False,
        "sym": bool(all((linear.zeros == 2 ** (linear.bits - 1)).all() for linear in linears.values())),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["ptq-harness"]},
    })  # fmt: skip


def _faults(linear: QuantizedLinear) -> Iterator[str]:
    yield from weight_faults(linear, _BITS)
    if linear.activation is not None:
        yield f"activations have {linear.activation.bits} bits"


def _tensors(linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Codes are packed along the inputs, zero points along the outputs; both lie with the outputs last."""
    inputs = linear.codes.shape[1]
    tensors = {
        "qweight": pack_words(linear.codes, linear.bits).T,
        "qzeros": pack_words(linear.zeros.T, linear.bits),
        "scales": linear.scales.T,
        "g_idx": (torch.arange(inputs) // linear.group_size).to(torch.int32),
    }
    return tensors if linear.bias is None else tensors | {"bias": linear.bias}
