"""DuQuant over whole models: the same function before rounding, then clipping, grouping, seeds and learned clipping."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from harness.architecture import discover
from harness.driver import quantize_model
from harness.linear import round_to_nearest
from harness.methods.duquant import DuQuant
from harness.methods.duquant_lwc import ClippedLinear
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec, WeightFormat, encode_tokens, simulate_tokens
from harness.settings import Setting
from harness.simulation import SimulatedInput
from harness.transform import BlockRotation, InputTransform

W4A4 = Setting.parse("W4A4")
FEW = {"max_rotation_step": 8}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def odd_heads() -> PreTrainedModel:
    """Grouped-query attention, heads of 12 channels, blocks of 16 and 32: no size equals another."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 12, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval().requires_grad_(False)


def ids(sequences: int = 6) -> torch.Tensor:
    return torch.randint(3, 97, (sequences, 24), generator=seeded(5))


def loaded(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, None, "tiny", discover(model))  # type: ignore[arg-type]


def run(model: LoadedModel, method: DuQuant, folder: Path, setting: Setting = W4A4, seed: int = 0) -> QuantizedModel:
    return quantize_model(model, method, setting, ids(), seed=seed, checkpoints=folder, progress=silent)


@dataclass(frozen=True)
class Remembering(DuQuant):
    """Keeps the transformed weights that it was to round."""

    def round(self, weights: dict[str, torch.Tensor], *rest: Any) -> Any:
        MEMORY.update(weights)
        return super().round(weights, *rest)


MEMORY: dict[str, torch.Tensor] = {}


class Unrounded(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, transform: Any) -> None:
        super().__init__()
        self.held, self.offset, self.transform = weight, bias, transform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.transform.apply(x), self.held, self.offset)


@pytest.mark.parametrize("calibration", ["paper", "official", "tokens"])
@pytest.mark.parametrize("name", ["odd heads", "qwen2, biased", "gemma", "opt", "phi, parallel branches"])
def test_the_transformed_model_is_the_model(name: str, calibration: Any, tmp_path: Path) -> None:
    """With all bits kept: smoothing, rotations and permutations cancel, for a batch of four."""
    model = loaded(odd_heads() if name == "odd heads" else build(name))
    plain = model.module(input_ids=ids(4)).logits
    MEMORY.clear()
    result = run(model, Remembering(calibration=calibration, **FEW), tmp_path)
    QuantizedModel(norms=result.norms).install(model.module, model.architecture)
    for linear, weight in MEMORY.items():
        parent, _, child = linear.rpartition(".")
        part = result.linears[linear]
        setattr(model.module.get_submodule(parent), child, Unrounded(weight, part.bias, part.transform))
    logits = model.module(input_ids=ids(4)).logits
    assert float((logits - plain).norm() / plain.norm()) < 1e-4


def test_one_transform_for_each_shared_input(tmp_path: Path) -> None:
    result = run(loaded(odd_heads()), DuQuant(**FEW), tmp_path)
    transforms = {name.rpartition(".")[2]: part.transform for name, part in result.linears.items() if ".0." in name}
    assert transforms["q_proj"] is transforms["k_proj"] is transforms["v_proj"]
    assert transforms["gate_proj"] is transforms["up_proj"]
    assert len({id(transform) for transform in transforms.values()}) == 4
    rotations = [step.matrix for t in transforms.values() for step in t.steps if isinstance(step, BlockRotation)]
    for matrix in rotations:
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(matrix)), rtol=0, atol=1e-5)
    assert {len(matrix) for matrix in rotations} == {16, 32}
    smooth = {name: transform.smooth is not None for name, transform in transforms.items()}
    assert smooth == {name: name == "o_proj" for name in smooth}  # the only one that nothing before it can absorb


def test_rows_of_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    model = loaded(odd_heads())
    run(model, DuQuant(**FEW), tmp_path).install(model.module, model.architecture)
    together = model.module(input_ids=ids(4)).logits
    alone = torch.cat([model.module(input_ids=row[None]).logits for row in ids(4)])
    same = torch.isclose(together, alone, rtol=1e-3, atol=1e-3)  # a code may flip where two roundings tie
    assert same.float().mean() > 0.99


def test_seeds_decide_the_rotations_and_nothing_else_does(tmp_path: Path) -> None:
    results = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(folder) % 1000)
        results.append(run(loaded(odd_heads()), DuQuant(**FEW), tmp_path / folder, seed=seed))
    codes = [torch.cat([part.codes.flatten() for part in result.linears.values()]) for result in results]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("options", [{}, {"weights": "gptq"}, {"calibration": "paper"}])
def test_a_resumed_walk_ends_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    setting = Setting.parse("W4A4KV4")
    whole = run(loaded(odd_heads()), DuQuant(**options, **FEW), tmp_path / "whole", setting)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "00000.safetensors").write_bytes((tmp_path / "whole" / "00000.safetensors").read_bytes())
    resumed = run(loaded(odd_heads()), DuQuant(**options, **FEW), tmp_path / "part", setting)
    for name, part in whole.linears.items():
        assert torch.equal(part.codes, resumed.linears[name].codes)
        assert torch.equal(part.scales, resumed.linears[name].scales)


def test_queries_and_keys_are_rotated_by_the_heads_own_size(tmp_path: Path) -> None:
    model = loaded(odd_heads())
    plain = model.module(input_ids=ids(2)).logits
    result = run(model, DuQuant(**FEW), tmp_path, Setting.parse("W4A4KV4"))
    for spec in result.attention.values():
        assert spec.rotation is not None and spec.rotation.shape == (12, 12) and spec.kv == ActivationSpec(4)
        assert int((spec.rotation[0] != 0).sum()) == 4  # the largest power of two in 12
    sixteen = {n: type(spec)(ActivationSpec(16), spec.rotation) for n, spec in result.attention.items()}
    QuantizedModel(attention=sixteen).install(model.module, model.architecture)
    assert float((model.module(input_ids=ids(2)).logits - plain).norm() / plain.norm()) < 1e-3
    off = run(loaded(odd_heads()), DuQuant(qk_hadamard=False, **FEW), tmp_path / "off", Setting.parse("W4A4KV4"))
    assert all(spec.rotation is None for spec in off.attention.values())


def test_gptq_on_rotated_weights_leaves_less_output_error(tmp_path: Path) -> None:
    errors = []
    for weights in ("rtn", "gptq"):
        model = loaded(odd_heads())
        plain = model.module(input_ids=ids()).logits
        setting = Setting.parse("W3A16")
        run(model, DuQuant(weights=weights, **FEW), tmp_path / weights, setting).install(
            model.module, model.architecture
        )  # type: ignore[arg-type]
        errors.append(float((model.module(input_ids=ids()).logits - plain).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_four_bit_tokens_with_outliers_lose_less_once_transformed() -> None:
    x = torch.randn(256, 512, generator=seeded())
    x[:, 17] *= 20
    x[:, 300] += 40
    lost = {}
    for rotation in ("search", "hadamard", "none"):
        steps, _ = DuQuant(rotation=rotation, max_rotation_step=64).find_steps(x, seeded())  # type: ignore[arg-type]
        turned = InputTransform(steps=steps).apply(x)
        lost[rotation] = float((simulate_tokens(turned, ActivationSpec(4)) - turned).norm())
    assert lost["search"] < 0.5 * lost["none"] and lost["hadamard"] < 0.5 * lost["none"]


def test_clips_reach_tokens_and_weights(tmp_path: Path) -> None:
    clipped = run(loaded(odd_heads()), DuQuant(**FEW), tmp_path / "a").linears
    full = run(loaded(odd_heads()), DuQuant(weight_clip=1.0, activation_clip=1.0, **FEW), tmp_path / "b").linears
    name = next(iter(clipped))
    torch.testing.assert_close(clipped[name].scales.float(), 0.8 * full[name].scales.float(), rtol=2e-3, atol=0)
    x = torch.randn(4, 48, generator=seeded())
    scales = [encode_tokens(x, part[name].activation)[1] for part in (clipped, full)]
    torch.testing.assert_close(scales[0], 0.9 * scales[1])


@pytest.mark.parametrize(("setting", "kept"), [("W3A16", 0.8), ("W4A16", 0.8), ("W8A16", 1.0)])
def test_weights_of_eight_bits_are_not_clipped_unasked(setting: str, kept: float) -> None:
    assert DuQuant().format(Setting.parse(setting)).clip == kept
    assert DuQuant(weight_clip=0.7).format(Setting.parse(setting)).clip == 0.7


def test_what_the_report_says(tmp_path: Path) -> None:
    rows = run(loaded(odd_heads()), DuQuant(**FEW), tmp_path).report
    row = {row["layer"].rpartition(".")[2]: row for row in rows}
    assert row["q_proj"]["transform_multiply_adds"] == 48 * (16 + 16)
    assert row["o_proj"]["transform_multiply_adds"] == 48 * (16 + 16 + 1) and row["o_proj"]["smooth_online"]
    assert all(0 < r["weight_error"] < 0.5 and r["seconds"] > 0 for r in rows)
    assert all(search["orthogonality"] < 1e-10 for r in rows for search in r["searches"])


def test_supports() -> None:
    assert DuQuant().supports(Setting.parse("W4A16")) is None
    assert "W2 to W8" in str(DuQuant().supports(Setting.parse("W16A4")))


# Learned clipping


def block_losses(result: QuantizedModel) -> list[list[float]]:
    rows = {row["layer"].rpartition(".self_attn")[0]: row["lwc"] for row in result.report if "q_proj" in row["layer"]}
    return [row["held_out_losses"] for row in rows.values()]


def test_learned_clipping_helps_where_the_fixed_one_is_far_off(tmp_path: Path) -> None:
    """At 3 bits, keeping all of each range is far from best for a row of 48 normal weights."""
    options = {"weight_clip": 1.0, "weights": "rtn", **FEW}
    setting = Setting.parse("W3A16")
    learned = run(loaded(odd_heads()), DuQuant(lwc=True, lwc_epochs=8, lwc_lr=0.03, **options), tmp_path / "a", setting)
    plain = run(loaded(odd_heads()), DuQuant(**options), tmp_path / "b", setting)
    for losses in block_losses(learned):
        assert len(losses) == 9 and min(losses) < 0.97 * losses[0]
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(learned.linears[name].scales, plain.linears[name].scales)
    # Coordinates and everything else of the layer are as they were.
    assert torch.equal(learned.linears[name].transform.steps[0].matrix, plain.linears[name].transform.steps[0].matrix)  # type: ignore[union-attr]


def test_clipping_that_makes_it_worse_is_not_kept(tmp_path: Path) -> None:
    options = {"weights": "rtn", **FEW}
    wild = run(loaded(odd_heads()), DuQuant(lwc=True, lwc_epochs=2, lwc_lr=50.0, **options), tmp_path / "a")
    plain = run(loaded(odd_heads()), DuQuant(**options), tmp_path / "b")
    assert not any(row["lwc"]["kept"] for row in wild.report)
    for name, part in plain.linears.items():
        assert torch.equal(part.codes, wild.linears[name].codes)


def test_clipping_is_learned_under_quantized_keys_and_values(tmp_path: Path) -> None:
    options = {"weight_clip": 1.0, "weights": "rtn", **FEW}
    learned = run(
        loaded(odd_heads()), DuQuant(lwc=True, lwc_epochs=4, lwc_lr=0.03, **options), tmp_path, Setting.parse("W3A8KV4")
    )
    assert all(min(losses) < losses[0] for losses in block_losses(learned))


def test_the_student_begins_at_the_plain_result_and_can_learn() -> None:
    """The student begins at the plain result, and every factor is reached by gradients."""
    weight = torch.randn(3, 8, generator=seeded())
    setting = Setting.parse("W4A16")
    format = replace(WeightFormat.of(setting), clip=0.8)
    plain = round_to_nearest(weight, setting, format=format)
    module = ClippedLinear(weight, plain, format, SimulatedInput(None, None, 1))
    x = torch.eye(8)
    torch.testing.assert_close(module(x).T, plain.weight(), rtol=1e-3, atol=1e-5)
    with torch.enable_grad():
        module(x).square().sum().backward()
    assert module.upper.grad is not None and bool((module.upper.grad != 0).all())
    learned = module.quantized(plain)
    assert torch.equal(learned.codes, plain.codes) and torch.equal(learned.zeros, plain.zeros)


def test_learned_clipping_is_for_rounding() -> None:
    assert "weights=rtn" in str(DuQuant(lwc=True, weights="gptq").supports(W4A4))
