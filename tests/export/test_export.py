"""Exported checkpoints: the same integers in other places; what a format cannot carry is refused with the reason."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import harness
from harness.errors import HarnessError, Unsupported
from harness.export import compressed_tensors, export, gptq, native
from harness.export.checkpoint import Finished
from harness.kernels import native as kernels_in_c
from harness.kernels.execute import KernelLinear

LOAD_BACK = Path(__file__).with_name("load_back.py")
IDS = torch.randint(2, 512, (4, 64), generator=torch.Generator().manual_seed(1))


def logits(finished: Finished) -> torch.Tensor:
    module = copy.deepcopy(finished.model.module)
    finished.quantized.install(module, finished.model.architecture)
    with torch.no_grad():
        return module(input_ids=IDS).logits


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, words] to [rows, codes], by plain arithmetic."""
    unsigned = words.long() % 2**32
    return torch.stack([unsigned // 2 ** (bits * i) % 2**bits for i in range(32 // bits)], dim=-1).flatten(1)


@pytest.mark.parametrize("setting", ["W4A16g64", "W4A8KV4", "W3A16", "W2A16g16"])
def test_native_runs_as_the_cell_did(finish, tmp_path: Path, setting: str) -> None:
    finished = finish("gptq", setting)
    native.write(finished, tmp_path / "out")
    loaded = harness.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=IDS).logits, logits(finished))


def test_native_carries_rotations_and_folded_norms(finish, tmp_path: Path) -> None:
    finished = finish("duquant:max_rotation_step=4", "W4A4")
    assert finished.quantized.norms and any(linear.transform for linear in finished.quantized.linears.values())
    native.write(finished, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(harness.load(tmp_path / "out").module(input_ids=IDS).logits, logits(finished))


@pytest.mark.parametrize(("method", "setting"), [("gptq", "W4A16g64"), ("duquant:max_rotation_step=4", "W4A8")])
def test_native_runs_through_its_kernels(finish, tmp_path: Path, method: str, setting: str) -> None:
    finished = finish(method, setting)
    native.write(finished, tmp_path / "out")
    loaded = harness.load(tmp_path / "out", execute="kernels")
    for name in finished.quantized.linears:
        assert isinstance(loaded.module.get_submodule(name), KernelLinear)
    with torch.no_grad():
        found, exact = loaded.module(input_ids=IDS).logits, logits(finished)
    if setting == "W4A8" and kernels_in_c.unavailable() is None:  # integers on both sides
        assert torch.equal(found, exact)
    else:
        assert 0 < float((found - exact).norm() / exact.norm()) < 0.05  # rounded otherwise, and no more than that


def test_native_says_which_layer_has_no_kernel(finish, tmp_path: Path) -> None:
    native.write(finish("rtn", "W3A16"), tmp_path / "out")
    with pytest.raises(Unsupported, match=r"layers\.0\..*3"):
        harness.load(tmp_path / "out", execute="kernels")
    with pytest.raises(HarnessError, match="simulation, kernels"):
        harness.load(tmp_path / "out", execute="magic")  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["W4A16g64", "W8A16g16", "W2A16", "W4A16g16sym"])
def test_gptq_holds_the_integers(finish, tmp_path: Path, setting: str) -> None:
    finished = finish("rtn", setting)
    gptq.write(finished, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, linear in finished.quantized.linears.items():
        assert torch.equal(unpacked(stored[f"{name}.qweight"].T, linear.bits), linear.codes.long())
        assert torch.equal(unpacked(stored[f"{name}.qzeros"], linear.bits), linear.zeros.T.long())
        assert torch.equal(stored[f"{name}.scales"], linear.scales.T)
        assert f"{name}.weight" not in stored
    assert "model.embed_tokens.weight" in stored


@pytest.mark.parametrize("setting", ["W4A16g64", "W8A16", "W4A8", "W8A8"])
def test_compressed_tensors_holds_the_integers(finish, tmp_path: Path, setting: str) -> None:
    finished = finish("rtn", setting)
    compressed_tensors.write(finished, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    (group,) = AutoConfig.from_pretrained(tmp_path / "out").quantization_config["config_groups"].values()
    assert group["format"] == "pack-quantized"  # else the library takes layers with quantized inputs for another format
    for name, linear in finished.quantized.linears.items():
        assert torch.equal(unpacked(stored[f"{name}.weight_packed"], linear.bits), linear.codes.long())
        assert torch.equal(unpacked(stored[f"{name}.weight_zero_point"].T, linear.bits), linear.zeros.T.long())
        assert stored[f"{name}.weight_shape"].tolist() == list(linear.codes.shape)


@pytest.mark.parametrize(
    ("format", "method", "setting", "reason"),
    [
        (gptq, "rtn", "W4A8", "activations have 8 bits"),
        (gptq, "rtn", "W3A16", "codes have 3 bits"),
        (gptq, "gptq:axis=ic", "W4A16g16", "groups run along the outputs"),
        (gptq, "duquant:max_rotation_step=4", "W4A16", "inputs are transformed at run time"),
        (compressed_tensors, "duquant:max_rotation_step=4", "W4A8", "inputs are transformed at run time"),
        (compressed_tensors, "rtn", "W4A4KV4", "keys and values are quantized"),
        (compressed_tensors, "rtn", "W2A16", "codes have 2 bits"),
    ],
)
def test_what_a_format_cannot_carry_is_refused(
    finish, tmp_path: Path, format: ModuleType, method: str, setting: str, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        format.write(finish(method, setting), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_uses_are_told(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no cell here"):
        export(tmp_path, "gptq", tmp_path / "out")
    with pytest.raises(HarnessError, match="not offered"):
        export(tmp_path, "awq", tmp_path / "out")
    with pytest.raises(HarnessError, match="there already"):
        export(tmp_path, "gptq", tmp_path)
    with pytest.raises(HarnessError, match="not an exported model"):
        harness.load(tmp_path)


@pytest.mark.parametrize(
    ("library", "format", "method", "setting"),
    [
        *(("gptqmodel", gptq, method, "W4A16g64") for method in ("rtn", "gptq")),
        *(("compressed_tensors", compressed_tensors, method, "W4A16g64") for method in ("rtn", "gptq")),
        ("compressed_tensors", compressed_tensors, "rtn", "W8A16g64"),
        ("compressed_tensors", compressed_tensors, "rtn", "W4A8"),
        ("compressed_tensors", compressed_tensors, "rtn", "W8A8"),
    ],
)
def test_the_formats_own_library_gives_the_cells_logits(
    finish, tmp_path: Path, library: str, format: ModuleType, method: str, setting: str
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: tox -e formats")
    finished = finish(method, setting)
    format.write(finished, tmp_path / "out")
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    words = [sys.executable, str(LOAD_BACK), *(str(tmp_path / name) for name in ("out", "ids.safetensors", "logits"))]
    subprocess.run(words, check=True)
    got, expected = load_file(tmp_path / "logits")["logits"], logits(finished)
    assert float((got - expected).abs().max()) < 1e-3
    assert torch.equal(got.argmax(dim=-1), expected.argmax(dim=-1))
