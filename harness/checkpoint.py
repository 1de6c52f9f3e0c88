"""What a checkpoint folder holds, read from its JSON and safetensors headers alone: no tensor, no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import atomic
from harness.errors import HarnessError
from harness.paths import cache_dir

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and safetensors weights whose headers are sound."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of the decoder blocks, ``name -> (out_features, in_features)``, told by name and rank.

        For early checks only; the model itself has the last word (:mod:`harness.architecture`).
        """
        return {
            name.removesuffix(".weight"): (info.shape[0], info.shape[1])
            for name, info in self.tensors.items()
            if len(info.shape) == 2 and name.endswith(".weight") and _BLOCK.search(name)
        }

    def block_of(self, name: str) -> str | None:
        """The decoder block that the tensor ``name`` lies in, told by the first number in its name."""
        found = _BLOCK.search(name)
        return name[: found.end() - 1] if found else None

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Everything that decides what the model computes, in a fixed order."""
        weights = sorted({info.file for info in self.tensors.values()})
        others = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        return tuple(self.path / name for name in [*others, *weights] if (self.path / name).is_file())

    def sha256(self) -> str:
        """Hash of weights, configuration and tokenizer. Remembered per file until its size or time changes."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(f"{file.name}\0{_file_sha256(file)}\n".encode())
        return total.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of the checkpoint at ``path``.

    Raises HarnessError for a missing folder or file, weights that exist only as pickles, and safetensors files that
    are truncated, garbled, or whose tensors overlap or leave gaps.
    """
    if not path.is_dir():
        raise HarnessError(f"no checkpoint folder at {path}", fix="give a folder with config.json and *.safetensors")
    config = _json(path / "config.json")
    if (path / "adapter_config.json").exists():  # transformers would load the model that it names, from wherever
        raise HarnessError(
            "this is an adapter, not a model", where=str(path), fix="merge it into its model: model.merge_and_unload()"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        tensors.update(_read_header(file))
    return Checkpoint(path, config, tensors)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise HarnessError(f"{index.name} has no map of weights", where=str(path), fix="fetch the checkpoint again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or "\0" in name:
                raise HarnessError(f"the index names a file outside the folder: {name!r}", where=str(index))
            if not (path / name).is_file():
                raise HarnessError(f"{name} is missing", where=str(path), fix="fetch the checkpoint again")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise HarnessError(
            f"the weights are pickled ({pickled[0]}); reading a pickle can run code, so it is never done",
            where=str(path),
            fix="convert them to safetensors on a machine that trusts them: model.save_pretrained(folder)",
        )
    raise HarnessError("no *.safetensors in the checkpoint folder", where=str(path), fix="fetch the checkpoint again")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _broken(file, "its header length is impossible")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(int(n) for n in entry["shape"]), file.name)
            for name, entry in entries.items()
        }
        spans = sorted((int(e["data_offsets"][0]), int(e["data_offsets"][1]), name) for name, e in entries.items())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise _broken(file, "its header is not a safetensors header") from None
    end = 0
    for start, stop, name in spans:
        info = tensors[name]
        if info.dtype not in _DTYPE_BYTES:
            raise _broken(file, f"tensor {name!r} has the unknown type {info.dtype!r}")
        if start != end or stop - start != math.prod(info.shape) * _DTYPE_BYTES[info.dtype]:
            raise _broken(file, f"the bytes of tensor {name!r} do not fit its shape")
        end = stop
    if size != 8 + length + end:
        raise _broken(file, f"it has {size:,} bytes and should have {8 + length + end:,} (cut off?)")
    return tensors


def _broken(file: Path, why: str) -> HarnessError:
    return HarnessError(
        f"{file.name} is not a sound safetensors file: {why}", where=str(file.parent), fix="fetch the checkpoint again"
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise HarnessError(f"{path.name} is missing", where=str(path.parent), fix="give a Hugging Face folder")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise HarnessError(f"{path.name} is too large to be one", where=str(path.parent), fix="fetch it again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise HarnessError(f"{path.name} is not JSON: {error}", where=str(path.parent), fix="fetch it again") from None
    if not isinstance(value, dict):
        raise HarnessError(f"{path.name} is not a JSON object", where=str(path.parent), fix="fetch it again")
    return value


def _file_sha256(file: Path) -> str:
    stat = file.stat()
    key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    memo = cache_dir() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    if memo.is_file():
        return memo.read_text()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    atomic.write_text(memo, digest)
    return digest
