"""The walk through a model: windows, streams, resume, and what a method may not do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.architecture import Block
from harness.attention import AttentionSpec
from harness.driver import quantize_model, windows
from harness.errors import BadOutput, HarnessError, Unsupported
from harness.linear import QuantizedLinear, round_to_nearest
from harness.method import QuantizedWindow
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec
from harness.registry import create_method
from harness.settings import Setting
from harness.window import Stream, Window

W4A8 = Setting.parse("W4A8g16")
CALIBRATION = torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(0))


def same(one: QuantizedModel, other: QuantizedModel) -> bool:
    return one.linears.keys() == other.linears.keys() and all(
        torch.equal(getattr(one.linears[n], part), getattr(other.linears[n], part))
        for n in one.linears
        for part in ("codes", "scales", "zeros")
    )


@dataclass(frozen=True)
class Scaled:
    """Uses both streams, the statistics and the random state: everything that a resume has to get right."""

    size: int = 1
    stride: int = 1
    reads: frozenset[str] = frozenset({"full_precision", "quantized"})
    hands_on: bool = False
    seen: list[Any] = field(default_factory=list)

    def supports(self, setting: Setting) -> str | None:
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears: dict[str, QuantizedLinear] = {}
        seen = []
        for quantized, reference in window.walk(window.quantized, window.full_precision):
            seen.append((quantized.names, quantized.hessian(), reference.hessian(), reference.absmax()))
            drift = quantized.absmax() / reference.absmax().clamp(min=1e-6)
            now = {}
            for name in quantized.names:
                noise = 1 + 0.01 * torch.randn(window.linears[name].weight.shape)
                now[name] = round_to_nearest(window.linears[name].weight * drift.mean() * noise, setting)
            quantized.install(now)
            linears |= now
        self.seen.append((window.index, seen))
        report = tuple({"layer": name} for name in linears)
        outputs = {"quantized": Stream(quantized.chunks), "full_precision": Stream(reference.chunks)}
        return QuantizedWindow(linears, report=report, outputs=outputs if self.hands_on else {})


def run(model: LoadedModel, method: Any, folder: Path, setting: Setting = W4A8, seed: int = 0) -> QuantizedModel:
    return quantize_model(model, method, setting, CALIBRATION, seed=seed, checkpoints=folder, progress=silent)


def test_rtn_is_rounding_and_leaves_the_model_alone(tiny_model: LoadedModel, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in tiny_model.module.named_parameters()}
    result = run(tiny_model, create_method("rtn", {}), tmp_path)
    assert tuple(result.linears) == tiny_model.architecture.linears
    for name, linear in result.linears.items():
        expected = round_to_nearest(before[f"{name}.weight"], W4A8)
        assert torch.equal(linear.codes, expected.codes)
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.module.named_parameters())
    assert [row["layer"] for row in result.report] == list(result.linears)
    assert all(0 < row["weight_error"] < 0.1 for row in result.report)


def test_float32_products_are_float32_within_and_as_they_were_without(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """TF32 would decide codes."""
    seen: list[str] = []

    @dataclass(frozen=True)
    class Asking(Scaled):
        def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
            seen.append(torch.get_float32_matmul_precision())
            return super().quantize(window, setting)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        run(tiny_model, Asking(), tmp_path)
        assert torch.get_float32_matmul_precision() == "high" and set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision(before)


def test_streams_are_chunked_statistics_of_the_true_inputs(tiny_model: LoadedModel, tmp_path: Path) -> None:
    inputs: dict[str, torch.Tensor] = {}
    name = tiny_model.architecture.blocks[1].shared_inputs[3][0]
    hook = tiny_model.module.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    tiny_model.module(input_ids=CALIBRATION)
    hook.remove()
    method = Scaled()
    run(tiny_model, method, tmp_path)
    _, stops = method.seen[1]
    names, quantized, full_precision, absmax = stops[3]
    assert names == (name,)
    x = inputs["x"].flatten(0, 1).double()
    torch.testing.assert_close(full_precision.matrix.double(), x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(absmax.double(), x.abs().amax(0), rtol=1e-5, atol=1e-6)
    assert full_precision.tokens == CALIBRATION.numel()
    assert not torch.allclose(quantized.matrix, full_precision.matrix, rtol=1e-3)


def test_a_stream_that_a_method_hands_on_is_the_one_the_driver_would_make(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    made = run(tiny_model, Scaled(), tmp_path / "made")
    assert same(run(tiny_model, Scaled(hands_on=True), tmp_path / "handed"), made)


def test_resumed_walk_is_bit_equal(tiny_model: LoadedModel, tmp_path: Path) -> None:
    whole = run(tiny_model, Scaled(), tmp_path / "whole")
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "00000.safetensors").write_bytes((tmp_path / "whole" / "00000.safetensors").read_bytes())
    method = Scaled()
    assert same(run(tiny_model, method, partial), whole)
    assert [index for index, *_ in method.seen] == [1]
    again = Scaled()
    assert same(run(tiny_model, again, partial), whole) and not again.seen


def test_resume_is_bit_equal_where_keys_and_values_are_quantized(tiny_model: LoadedModel, tmp_path: Path) -> None:
    setting, method = Setting.parse("W4A8KV4"), create_method("gptq", {})
    whole = run(tiny_model, method, tmp_path / "whole", setting)
    (tmp_path / "partial").mkdir()
    first = "00000.safetensors"
    (tmp_path / "partial" / first).write_bytes((tmp_path / "whole" / first).read_bytes())
    assert same(run(tiny_model, method, tmp_path / "partial", setting), whole)


def test_same_seed_same_integers_other_seed_others(tiny_model: LoadedModel, tmp_path: Path) -> None:
    first = run(tiny_model, Scaled(), tmp_path / "a")
    torch.randn(17)  # whatever was drawn before
    assert same(run(tiny_model, Scaled(), tmp_path / "b"), first)
    assert not same(run(tiny_model, Scaled(), tmp_path / "c", seed=1), first)


def blocks(n: int) -> list[Block]:
    return [Block(f"b{i}", (), (), False) for i in range(n)]


@pytest.mark.parametrize(
    ("n", "size", "stride", "expected"),
    [
        (3, 1, 1, [("0", "0"), ("1", "1"), ("2", "2")]),
        (4, 2, 1, [("01", "0"), ("12", "1"), ("23", "23")]),
        (5, 2, 2, [("01", "01"), ("23", "23"), ("4", "4")]),
        (5, 4, 2, [("0123", "01"), ("234", "234")]),
        (1, 4, 1, [("0", "0")]),
    ],
)
def test_windows_cover_every_block_once(n: int, size: int, stride: int, expected: list[tuple[str, str]]) -> None:
    found = [
        ("".join(b.name[1:] for b in m), "".join(b.name[1:] for b in x)) for m, x in windows(blocks(n), size, stride)
    ]
    assert found == expected
    assert "".join(leaving for _, leaving in found) == "".join(map(str, range(n)))


@dataclass(frozen=True)
class Forwarding(Scaled):
    """Rounds, and checks that the window's own forward is the walk's, plain and quantized."""

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        (chunk,) = window.quantized.chunks
        linears = {name: round_to_nearest(linear.weight, setting) for name, linear in window.linears.items()}
        part = QuantizedWindow(linears)
        for (stop,) in window.walk(window.quantized):
            ends = stop.chunks
        assert torch.equal(window.forward(chunk), ends[0])
        for (stop,) in window.walk(window.quantized):
            stop.install({name: linears[name] for name in stop.names})
            ends = stop.chunks
        assert torch.equal(window.forward(chunk, part), ends[0])
        self.seen.append(window.index)
        return part


def test_a_window_runs_forward_as_it_walks(tiny_model: LoadedModel, tmp_path: Path) -> None:
    method = Forwarding()
    run(tiny_model, method, tmp_path)
    assert method.seen == [0, 1]


def test_overlapping_windows_keep_what_leaves(tiny_model: LoadedModel, tmp_path: Path) -> None:
    result = run(tiny_model, Scaled(size=2, stride=1), tmp_path)
    assert tuple(result.linears) == tiny_model.architecture.linears
    assert [row["layer"] for row in result.report] == list(result.linears)


@dataclass(frozen=True)
class Spoilt(Scaled):
    """RTN with one thing wrong."""

    fault: str = ""

    def supports(self, setting: Setting) -> str | None:
        return "never" if self.fault == "unsupported" else None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears: dict[str, QuantizedLinear] = {}
        norms = {}
        for name, linear in window.linears.items():
            weight = linear.weight
            if self.fault == "nan" and name.endswith("up_proj"):
                weight = weight * torch.nan
            if self.fault == "shape" and name.endswith("up_proj"):
                weight = weight[:16]
            if self.fault != "skip" or not name.endswith("up_proj"):
                linears[name] = round_to_nearest(weight, setting)
        if self.fault == "norm":
            norms = {f"{window.blocks[0].name}.input_layernorm.weight": torch.full((64,), torch.inf)}
        if self.fault == "short norm":
            norms = {f"{window.blocks[0].name}.input_layernorm.weight": torch.ones(1)}
        if self.fault == "no norm":
            norms = {f"{window.blocks[0].name}.norm.weight": torch.ones(64)}
        if self.fault == "attention":
            spec = AttentionSpec(ActivationSpec(4))
            return QuantizedWindow(linears, attention={window.blocks[0].attentions[0]: spec})
        return QuantizedWindow(linears, norms)


@pytest.mark.parametrize(
    ("fault", "kind", "complaint"),
    [
        ("unsupported", Unsupported, "never"),
        ("skip", BadOutput, r"model\.layers\.0\.mlp\.up_proj was not quantized"),
        ("shape", BadOutput, r"up_proj has codes of shape \[16, 64\], not \[128, 64\]"),
        ("nan", BadOutput, r"a scale is not a finite positive number\n  where: model\.layers\.0"),
        ("norm", BadOutput, "input_layernorm.weight was replaced by something that is not a finite vector"),
        ("short norm", BadOutput, r"input_layernorm.weight is of shape \[64\], and was replaced by 1 numbers"),
        ("no norm", BadOutput, r"layers\.0\.norm\.weight is no parameter of the model"),
        (
            "attention",
            BadOutput,
            r"layers\.0\.self_attn has keys and values .*bits=4.*not None at W4A8g16",
        ),
    ],
)
def test_broken_contracts_are_named(
    tiny_model: LoadedModel, tmp_path: Path, fault: str, kind: type[HarnessError], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        run(tiny_model, Spoilt(fault=fault), tmp_path)


@pytest.mark.fault(19)
def test_damaged_weights_are_named_before_any_method_sees_them(tiny_model: LoadedModel, tmp_path: Path) -> None:
    tiny_model.module.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = torch.inf
    with pytest.raises(BadOutput, match=r"the weight of model\.layers\.1\.mlp\.up_proj holds NaN or infinity"):
        run(tiny_model, create_method("rtn", {}), tmp_path)


@pytest.mark.fault(19)
def test_calibration_that_overflows_is_named(tiny_model: LoadedModel, tmp_path: Path) -> None:
    tiny_model.module.get_parameter("model.layers.1.input_layernorm.weight").data.fill_(1e25)
    with pytest.raises(BadOutput, match=r"hold NaN or infinity\n  where: model\.layers\.1\.self_attn\.q_proj"):
        run(tiny_model, create_method("gptq", {}), tmp_path)


def test_kv_setting_reaches_every_attention(tiny_model: LoadedModel, tmp_path: Path) -> None:
    result = run(tiny_model, create_method("rtn", {}), tmp_path, Setting.parse("W4A8KV4"))
    assert list(result.attention) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {spec.kv.bits for spec in result.attention.values()} == {4}


@dataclass(frozen=True)
class Carrying(Scaled):
    """Blocks that stay go on from what the window before made of them; codes tell how often they were touched."""

    size: int = 2

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        linears, state = {}, {}
        for name, linear in window.linears.items():
            state[name] = window.carried.get(name, linear.weight) * (1 + 0.1 * torch.rand(1))
            linears[name] = round_to_nearest(state[name], setting)
        self.seen.append((window.index, sorted(window.carried)))
        stays = window.blocks[1].linears
        report = tuple({"layer": name} for name in linears)
        return QuantizedWindow(linears, report=report, state={name: state[name] for name in stays})


def test_state_reaches_the_next_window_and_survives_a_resume(four_blocks: LoadedModel, tmp_path: Path) -> None:
    method = Carrying()
    whole = run(four_blocks, method, tmp_path / "whole")
    blocks = four_blocks.architecture.blocks
    assert method.seen == [(0, []), (1, sorted(blocks[1].linears)), (2, sorted(blocks[2].linears))]
    assert not (tmp_path / "whole" / "00001.state.safetensors").exists()  # only the last one can be needed

    stopped = tmp_path / "stopped"

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(four_blocks, Carrying(), W4A8, CALIBRATION, seed=0, checkpoints=stopped, progress=stop)
    assert (stopped / "00001.state.safetensors").exists()
    again = Carrying()
    assert same(run(four_blocks, again, stopped), whole)
    assert again.seen == [(2, sorted(blocks[2].linears))]


@dataclass(frozen=True)
class Looking(Scaled):
    """Compares the full-precision stream behind the window with the model's own."""

    size: int = 2

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        targets = window.full_precision_outputs
        for given, chunk in zip(targets.chunks, window.full_precision.chunks, strict=True):
            assert torch.equal(given, window.forward(chunk))
        linears = {name: round_to_nearest(linear.weight, setting) for name, linear in window.linears.items()}
        return QuantizedWindow(linears)


@dataclass(frozen=True)
class Reading(Looking):
    """Only asks for it."""

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        assert len(window.full_precision_outputs.chunks) == 1
        linears = {name: round_to_nearest(linear.weight, setting) for name, linear in window.linears.items()}
        return QuantizedWindow(linears)


def test_the_full_precision_stream_behind_a_window_is_computed_once(four_blocks: LoadedModel, tmp_path: Path) -> None:
    run(four_blocks, Looking(), tmp_path / "looking")
    runs: list[str] = []
    for block in four_blocks.architecture.blocks:
        first = four_blocks.module.get_submodule(block.linears[0])
        first.register_forward_hook(lambda *_, name=block.name: runs.append(name))
    full_precision = frozenset({"full_precision"})
    run(four_blocks, Reading(reads=full_precision), tmp_path / "reading")
    assert runs == [block.name for block in four_blocks.architecture.blocks]
