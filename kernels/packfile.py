"""Packed layers on disk: one safetensors file with a version, and a SHA-256 for every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harness import atomic
from harness.errors import HarnessError
from harness.kernels.pack import PackedLinear
from harness.quantizer import ActivationSpec
from harness.transform import InputTransform

FORMAT_VERSION = 1
_METADATA_KEY = "harness-packed"
Tensors = dict[str, torch.Tensor]


def stored_bytes(layers: Mapping[str, PackedLinear]) -> int:
    """Bytes of all that the layers need at run time but biases: codes with their padding, scales, zeros, transforms."""
    tensors, _ = _to_tensors(layers)
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith("|bias"))


def bits_per_weight(layers: Mapping[str, PackedLinear]) -> float:
    """Counted from :func:`stored_bytes`; weights are those of the layers, without padding."""
    return 8 * stored_bytes(layers) / sum(layer.out_features * layer.in_features for layer in layers.values())


def save_packed(layers: Mapping[str, PackedLinear], path: Path) -> None:
    """Write all layers to one file, whole or not at all."""
    tensors, described = _to_tensors(layers)
    header = {"format": FORMAT_VERSION, "layers": described}
    with atomic.replacing(path) as temporary:
        save_file(tensors, temporary, {_METADATA_KEY: json.dumps(header, sort_keys=True, allow_nan=False)})


def load_packed(path: Path) -> dict[str, PackedLinear]:
    """Read what :func:`save_packed` wrote. Raises HarnessError for a file that is damaged or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise HarnessError(f"{path.name} holds no packed layers: {error}", where=str(path), fix="pack again") from error
    if header["format"] != FORMAT_VERSION:
        raise HarnessError(
            f"{path.name} has packed format {header['format']}, not {FORMAT_VERSION}", where=str(path), fix="pack again"
        )
    layers: dict[str, PackedLinear] = {}
    transforms: dict[str, InputTransform] = {}
    for name, about in header["layers"].items():
        if _sha256(_own(name, tensors)) != about["sha256"]:
            raise HarnessError(f"layer {name} is not as it was written", where=str(path), fix="pack again")
        owner = about["transform"]
        if owner is not None and owner not in transforms:  # one object for all that share it
            transforms[owner] = InputTransform.of_tensors(owner, tensors)
        layers[name] = _layer(name, about, tensors, transforms.get(owner))
    return layers


def _to_tensors(layers: Mapping[str, PackedLinear]) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    described: dict[str, Any] = {}
    owners: dict[int, str] = {}  # layers that share an input share its transform, stored once
    for name, layer in layers.items():
        parts = {"qweight": layer.qweight, "scales": layer.scales, "zeros": layer.zeros, "bias": layer.bias}
        tensors |= {f"{name}|{part}": value.contiguous() for part, value in parts.items() if value is not None}
        if layer.transform is not None and id(layer.transform) not in owners:
            owners[id(layer.transform)] = name
            tensors |= layer.transform.to_tensors(name)
        described[name] = {
            "bits": layer.bits,
            "group_size": layer.group_size,
            "axis": layer.axis,
            "shape": [layer.out_features, layer.in_features],
            "activation": asdict(layer.activation) if layer.activation else None,
            "transform": owners[id(layer.transform)] if layer.transform else None,
            "sha256": _sha256(_own(name, tensors)),
        }
    return tensors, described


def _layer(name: str, about: Mapping[str, Any], tensors: Tensors, transform: InputTransform | None) -> PackedLinear:
    return PackedLinear(
        qweight=tensors[f"{name}|qweight"],
        scales=tensors[f"{name}|scales"],
        zeros=tensors.get(f"{name}|zeros"),
        bits=about["bits"],
        group_size=about["group_size"],
        axis=about["axis"],
        out_features=about["shape"][0],
        in_features=about["shape"][1],
        bias=tensors.get(f"{name}|bias"),
        activation=ActivationSpec(**about["activation"]) if about["activation"] else None,
        transform=transform,
    )


def _own(name: str, tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}|")}


def _sha256(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
