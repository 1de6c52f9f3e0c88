"""Safetensors files of our own: a description as JSON, tensors, and a SHA-256 of the one and of each of the others.

A flipped bit in a code is still a code, and one in a group size still a number: only a checksum tells. Files are
written whole or not at all, and what is read is what was written, or an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harness import atomic
from harness.errors import HarnessError

Tensors = dict[str, torch.Tensor]
_SUMS = "sha256"


def save(path: Path, key: str, description: Mapping[str, Any], tensors: Tensors) -> None:
    """Write ``tensors`` and their ``description``, which has a ``format`` number, under the metadata key ``key``."""
    sums = {name: _tensor_sha256(tensor) for name, tensor in tensors.items()}
    text = json.dumps({**description, _SUMS: sums}, sort_keys=True, allow_nan=False)
    with atomic.replacing(path) as temporary:
        save_file(tensors, temporary, {key: text, f"{key}-{_SUMS}": _sha256(text.encode())})


def load(path: Path, key: str, format: int, *, fix: str) -> tuple[dict[str, Any], Tensors]:
    """The description and the tensors that :func:`save` was given.

    Raises HarnessError, with ``fix``, for a file of another kind or format, and for one that is not as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata[key]
            description = json.loads(text)
            found = description["format"]
            tensors = {name: file.get_tensor(name) for name in file.keys()} if found == format else {}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise HarnessError(f"{path.name} cannot be read: {error!r:.200}", where=str(path), fix=fix) from error
    if found != format:
        raise HarnessError(f"{path.name} has format {found!r:.20}, not {format}", where=str(path), fix=fix)
    sums = description.pop(_SUMS, None)
    sealed = metadata.get(f"{key}-{_SUMS}") == _sha256(text.encode())
    if not sealed or {name: _tensor_sha256(tensor) for name, tensor in tensors.items()} != sums:
        raise HarnessError(f"{path.name} is not as it was written", where=str(path), fix=fix)
    return description, tensors


def _tensor_sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
