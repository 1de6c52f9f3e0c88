import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.checkpoint import open_checkpoint
from harness.errors import HarnessError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4),
        "model.layers.0.norm.weight": torch.zeros(4),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
    }
    save_file(tensors, path / "model.safetensors")
    return path


def test_headers_tell_the_layers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.block_linears() == {"model.layers.0.mlp.up_proj": (6, 4), "model.layers.1.mlp.up_proj": (6, 4)}
    assert checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].dtype == "BF16"


def test_hash_follows_the_content(folder: Path) -> None:
    first = open_checkpoint(folder).sha256()
    assert open_checkpoint(folder).sha256() == first
    save_file({"model.layers.0.a.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert open_checkpoint(folder).sha256() != first


def test_sharded_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HarnessError, match=r"b\.safetensors is missing"):
        open_checkpoint(folder)
    save_file({"y": torch.ones(2)}, folder / "b.safetensors")
    assert "y" in open_checkpoint(folder).tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(HarnessError, match="outside the folder"):
        open_checkpoint(folder)


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "header length is impossible"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header length is impossible"),
        (struct.pack("<Q", 4) + b"oops", "is not a safetensors header"),
        (header({"a": 3}), "is not a safetensors header"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "is not a safetensors header"),
        (header({"a": ONE}, b"\0" * 7), r"it has \d+ bytes and should have \d+ \(cut off\?\)"),
        (header({"a": ONE}, b"\0" * 9), "it has"),
        (header({"a": ONE, "b": ONE}, b"\0" * 8), "do not fit its shape"),
        (header({"a": ONE | {"shape": [3]}}, b"\0" * 8), "do not fit its shape"),
        (header({"a": ONE | {"dtype": "PICKLE"}}, b"\0" * 8), "unknown type"),
        (header({"a": ONE | {"shape": [-2]}}, b"\0" * 8), "do not fit its shape"),
    ],
)
def test_unsound_files_are_refused_before_anything_is_read(folder: Path, content: bytes, complaint: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(HarnessError, match=complaint):
        open_checkpoint(folder)


@pytest.mark.fault(26)
def test_pickles_are_never_an_option(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(HarnessError, match=r"pickled[\s\S]*fix:"):
        open_checkpoint(folder)


@pytest.mark.parametrize("config", [None, "not json", "[]"])
def test_config_must_be_there_and_sound(folder: Path, config: str | None) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(HarnessError, match=r"config\.json"):
        open_checkpoint(folder)
    with pytest.raises(HarnessError, match="no checkpoint folder"):
        open_checkpoint(folder / "nowhere")
