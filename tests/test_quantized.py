from pathlib import Path

import pytest
import torch

from harness.attention import AttentionSpec
from harness.errors import HarnessError
from harness.linear import QuantizedLinear, round_to_nearest
from harness.models import LoadedModel
from harness.quantized import QuantizedModel, unquantized_size
from harness.quantizer import ActivationSpec, WeightFormat
from harness.settings import Setting
from harness.transform import BlockRotation, InputTransform, Permutation


def layer(setting: str, axis: str = "oc", transform: InputTransform | None = None) -> QuantizedLinear:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    parsed = Setting.parse(setting)
    return round_to_nearest(
        weight, parsed, bias=torch.arange(32.0), transform=transform, format=WeightFormat.of(parsed, axis)
    )


def everything() -> QuantizedModel:
    shared = InputTransform(
        torch.rand(48) + 0.5,
        (BlockRotation(torch.eye(16)), Permutation(torch.randperm(48)), BlockRotation(torch.eye(16))),
    )
    return QuantizedModel(
        linears={
            "a.q": layer("W4A8", transform=shared),
            "a.k": layer("W4A8", transform=shared),
            "a.o": layer("W2A16g16"),
            "b.ic": layer("W3A16g16", axis="ic"),
            "b.sym": layer("W4A4sym"),
        },
        norms={"a.norm.weight": torch.rand(48)},
        attention={"a": AttentionSpec(ActivationSpec(4), torch.eye(8)), "b": AttentionSpec(ActivationSpec(8, True))},
        report=({"layer": "a.q", "weight_error": 0.25},),
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = everything()
    model.save(tmp_path / "m.safetensors")
    loaded = QuantizedModel.load(tmp_path / "m.safetensors")
    assert loaded.linears.keys() == model.linears.keys() and loaded.report == model.report
    x = torch.randn(3, 48)
    for name, one in model.linears.items():
        other = loaded.linears[name]
        for part in ("codes", "scales", "zeros", "bias"):
            assert torch.equal(getattr(one, part), getattr(other, part)), (name, part)
        assert (one.bits, one.group_size, one.axis, one.activation) == (
            other.bits, other.group_size, other.axis, other.activation,
        )  # fmt: skip
        if one.transform is not None:
            assert other.transform is not None and torch.equal(one.transform.apply(x), other.transform.apply(x))
    assert torch.equal(loaded.norms["a.norm.weight"], model.norms["a.norm.weight"])
    assert loaded.attention["b"] == model.attention["b"]
    assert torch.equal(loaded.attention["a"].rotation, torch.eye(8))  # type: ignore[arg-type]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = everything()
    for name in ("one", "two"):
        model.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("setting", "axis", "bits"),
    [
        ("W4A16g16", "oc", 4 + 16 / 16 + 4 / 16),
        ("W4A16g16sym", "oc", 4 + 16 / 16),  # a symmetric zero point is not stored
        ("W2A16g16", "ic", 2 + 16 / 16 + 2 / 16),
        ("W3A16", "oc", 3 + 16 / 48 + 3 / 48),
        ("W8A8", "oc", 8 + 16 / 48 + 8 / 48),
    ],
)
def test_bits_per_weight_are_counted_from_stored_bytes(setting: str, axis: str, bits: float) -> None:
    model = QuantizedModel({"a": layer(setting, axis)})
    assert model.bits_per_weight == pytest.approx(bits)
    assert model.packed_bytes == pytest.approx(bits * 32 * 48 / 8)


def test_a_transform_is_paid_for_once(tmp_path: Path) -> None:
    with_transform = everything().packed_bytes
    model = everything()
    plain = QuantizedModel({n: layer("W4A8") if n in ("a.q", "a.k") else q for n, q in model.linears.items()})
    assert with_transform - plain.packed_bytes == 4 * 48 + 2 * 4 * 16 * 16 + 8 * 48


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    everything().save(path)
    whole = path.read_bytes()
    for damage in (b"", whole[:100], whole[: len(whole) // 2], b"\x00" * len(whole)):
        path.write_bytes(damage)
        with pytest.raises(HarnessError, match=r"cannot be read|is not as it was written"):
            QuantizedModel.load(path)


def test_unquantized_size(tiny_model: LoadedModel) -> None:
    bits, size = unquantized_size(tiny_model.module, tiny_model.architecture)
    assert bits == 32
    assert size == 4 * 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)


def test_what_was_loaded_can_be_saved_again_and_shares_what_was_shared(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    everything().save(first)
    loaded = QuantizedModel.load(first)
    assert loaded.linears["a.q"].transform is loaded.linears["a.k"].transform
    loaded.save(second)
    again = QuantizedModel.load(second)
    assert again.packed_bytes == everything().packed_bytes
    assert all(torch.equal(again.linears[name].codes, one.codes) for name, one in loaded.linears.items())
