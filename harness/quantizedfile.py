"""Quantized layers in a safetensors file: read as few of them as are wanted, join files without reading any."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from harness import atomic
from harness.attention import AttentionSpec
from harness.errors import HarnessError
from harness.kernels.bits import unpack_bits
from harness.linear import QuantizedLinear
from harness.method import QuantizedWindow, Report
from harness.quantizer import ActivationSpec
from harness.transform import InputTransform

FORMAT_VERSION = 1
_METADATA_KEY = "harness"
_NOT_OF_LINEARS = ("bias", "norm", "rotation")
_COPIED_BYTES = 1 << 24
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizedFile:
    """A file that :func:`write` or :func:`join` made. Its tensors stay on disk until they are asked for.

    Raises HarnessError for a file that is damaged or of another format.
    """

    path: Path

    @cached_property
    def header(self) -> dict[str, Any]:
        """What the tensors are: ``linears`` and ``attention`` by module name, and the ``report``."""
        try:
            with safe_open(self.path, framework="pt") as file:
                header: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA_KEY])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        if header["format"] != FORMAT_VERSION:
            raise HarnessError(
                f"{self.path.name} has format {header['format']}, not {FORMAT_VERSION}", where=str(self.path)
            )
        return header

    @property
    def report(self) -> tuple[Report, ...]:
        return tuple(self.header["report"])

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of everything that the linears need at run time: codes, scales, zero points, transforms."""
        _, entries = _safetensors_header(self.path)
        return sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in entries.items()
            if name.partition("|")[2] not in _NOT_OF_LINEARS
        )

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(math.prod(about["shape"]) for about in self.header["linears"].values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / self.weights

    def part(self, prefixes: Sequence[str] = ("",)) -> QuantizedWindow:
        """The layers whose names begin with one of ``prefixes``. Transforms are shared, as they were."""
        start = tuple(prefixes)
        described = {name: about for name, about in self.header["linears"].items() if name.startswith(start)}
        wanted = (*start, *(f"{about['transform']}|" for about in described.values() if about["transform"]))
        tensors = self._tensors(wanted)
        return QuantizedWindow(
            linears=_linears(described, tensors),
            norms={key.removesuffix("|norm"): value for key, value in tensors.items() if key.endswith("|norm")},
            attention={
                name: AttentionSpec(ActivationSpec(**kv), tensors.get(f"{name}|rotation"))
                for name, kv in self.header["attention"].items()
                if name.startswith(start)
            },
            report=tuple(row for row in self.report if row["layer"].startswith(start)),
        )

    def _tensors(self, prefixes: tuple[str, ...]) -> Tensors:
        try:
            with safe_open(self.path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118 (not a dict)
                # Copied: a tensor that lies in the mapped file would keep all of it in memory.
                return {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> HarnessError:
        return HarnessError(
            f"{self.path.name} is not a quantized model: {error}", where=str(self.path), fix="delete it"
        )


def write(path: Path, tensors: Tensors, header: Mapping[str, Any]) -> None:
    """One file, whole or not at all. ``header`` as in :attr:`QuantizedFile.header`, without the format."""
    with atomic.replacing(path) as temporary:
        save_file(tensors, temporary, _metadata(header))


def join(parts: Sequence[Path], path: Path) -> None:
    """One file of the layers in ``parts``, without their reports, which hold times: equal layers make equal bytes.

    Tensors are copied as bytes, so that none is ever in memory as a whole. Raises HarnessError for a
    damaged part.
    """
    headers = [QuantizedFile(part).header for part in parts]
    together = {
        kind: {k: v for header in headers for k, v in header[kind].items()} for kind in ("linears", "attention")
    }
    found = [(name, entry, part, start) for part in parts for name, entry, start in _entries(part)]
    found.sort(key=lambda tensor: (-_item_bytes(tensor[1]), tensor[0]))  # as safetensors does: aligned without gaps
    entries: dict[str, dict[str, Any]] = {"__metadata__": _metadata(together | {"report": []})}
    end = 0
    for name, entry, _, _ in found:
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entries[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic.replacing(path) as temporary, open(temporary, "wb") as target:
        target.write(struct.pack("<Q", len(raw)) + raw)
        for _, entry, part, start in found:
            with part.open("rb") as source:
                source.seek(start + entry["data_offsets"][0])
                left = entry["data_offsets"][1] - entry["data_offsets"][0]
                while left:
                    left -= target.write(source.read(min(left, _COPIED_BYTES)))


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    return {_METADATA_KEY: json.dumps({"format": FORMAT_VERSION, **header}, allow_nan=False)}


def _entries(path: Path) -> Iterable[tuple[str, dict[str, Any], int]]:
    start, entries = _safetensors_header(path)
    return ((name, entry, start) for name, entry in entries.items())


def _safetensors_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors' bytes begin, and what lies there. The file is known to be sound: its header was read."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entries = json.loads(file.read(length))
    return 8 + length, {name: entry for name, entry in entries.items() if name != "__metadata__"}


def _item_bytes(entry: Mapping[str, Any]) -> int:
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    return int(size // max(1, math.prod(entry["shape"])))


def _linears(described: Mapping[str, dict[str, Any]], tensors: Tensors) -> dict[str, QuantizedLinear]:
    owners = {about["transform"] for about in described.values()} - {None}
    transforms = {owner: InputTransform.of_tensors(owner, tensors) for owner in owners}
    return {
        name: _linear(name, about, tensors, transforms.get(about["transform"])) for name, about in described.items()
    }


def _linear(name: str, about: dict[str, Any], tensors: Tensors, transform: InputTransform | None) -> QuantizedLinear:
    scales = tensors[f"{name}|scales"]
    zeros = torch.full(scales.shape, 2 ** (about["bits"] - 1), dtype=torch.uint8)
    if f"{name}|zeros" in tensors:
        zeros = unpack_bits(tensors[f"{name}|zeros"], about["bits"], tuple(scales.shape))
    return QuantizedLinear(
        codes=unpack_bits(tensors[f"{name}|codes"], about["bits"], tuple(about["shape"])),
        scales=scales,
        zeros=zeros,
        bits=about["bits"],
        group_size=about["group_size"],
        axis=about["axis"],
        bias=tensors.get(f"{name}|bias"),
        activation=ActivationSpec(**about["activation"]) if about["activation"] else None,
        transform=transform,
    )
