"""A quantized model: its linears as integers, on disk and in place of the full-precision ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.architecture import Architecture
from harness.attention import AttentionSpec, allow_quantized_attention, set_spec
from harness.kernels.bits import pack_bits
from harness.linear import QuantizedLinear, on_device
from harness.method import QuantizedWindow, Report
from harness.quantizedfile import QuantizedFile, Tensors, write
from harness.simulation import scored


@dataclass(frozen=True)
class QuantizedModel:
    """All quantized linears of a model (or of a part of it), replaced norms, attention, and the per-layer report."""

    linears: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    attention: Mapping[str, AttentionSpec] = field(default_factory=dict)
    report: tuple[Report, ...] = ()

    def joined(self, part: QuantizedWindow | QuantizedModel) -> QuantizedModel:
        """This model with ``part`` added to it."""
        return QuantizedModel(
            {**self.linears, **part.linears},
            {**self.norms, **part.norms},
            {**self.attention, **part.attention},
            (*self.report, *part.report),
        )

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of everything that the linears need at run time, as stored: codes, scales, zero points, transforms."""
        tensors, _ = _linears_to_tensors(self.linears)
        return sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith("|bias"))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / sum(linear.codes.numel() for linear in self.linears.values())

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors, described = _linears_to_tensors(self.linears)
        tensors |= {f"{name}|norm": value.contiguous() for name, value in self.norms.items()}
        attention = {}
        for name, spec in self.attention.items():
            attention[name] = asdict(spec.kv)
            if spec.rotation is not None:
                tensors[f"{name}|rotation"] = spec.rotation.contiguous()
        write(path, tensors, {"linears": described, "attention": attention, "report": self.report})

    @classmethod
    def load(cls, path: Path) -> QuantizedModel:
        """Read what :meth:`save` wrote. Raises HarnessError for a file that is damaged or of another format."""
        return cls().joined(QuantizedFile(path).part())

    def install(self, model: PreTrainedModel, architecture: Architecture) -> None:
        """Put what every linear is scored by, the norms and the attention specification in place, for good."""
        modules = dict(model.named_modules())
        linears = on_device(self.linears, model.device)
        for name, module in scored(linears, architecture.shared_inputs, model.dtype).items():
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
        for name, value in self.norms.items():
            owner, _, child = name.rpartition(".")
            parameter = getattr(modules[owner], child)
            parameter.data = value.to(parameter)
        if self.attention:
            allow_quantized_attention(model)
        for name, spec in self.attention.items():
            set_spec(modules[name], spec.on(model.device))


def unquantized_size(model: nn.Module, architecture: Architecture) -> tuple[float, int]:
    """Bits per weight and bytes of the block linears of a model that is not quantized."""
    weights = [model.get_submodule(name).weight for name in architecture.linears]
    size = sum(w.numel() * w.element_size() for w in weights if isinstance(w, torch.Tensor))
    return 8.0 * size / sum(w.numel() for w in weights if isinstance(w, torch.Tensor)), size


def _linears_to_tensors(linears: Mapping[str, QuantizedLinear]) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    described: dict[str, Any] = {}
    transforms: dict[int, str] = {}  # linears that share an input share its transform, stored once
    for name, linear in linears.items():
        tensors[f"{name}|codes"] = pack_bits(linear.codes, linear.bits)
        tensors[f"{name}|scales"] = linear.scales.contiguous()
        if not (linear.zeros == 2 ** (linear.bits - 1)).all():  # symmetric: the zero point is known
            tensors[f"{name}|zeros"] = pack_bits(linear.zeros, linear.bits)
        if linear.bias is not None:
            tensors[f"{name}|bias"] = linear.bias.contiguous()
        if linear.transform is not None and id(linear.transform) not in transforms:
            transforms[id(linear.transform)] = name
            tensors |= linear.transform.to_tensors(name)
        described[name] = {
            "shape": list(linear.codes.shape),
            "bits": linear.bits,
            "group_size": linear.group_size,
            "axis": linear.axis,
            "activation": asdict(linear.activation) if linear.activation else None,
            "transform": transforms[id(linear.transform)] if linear.transform else None,
        }
    return tensors, described
