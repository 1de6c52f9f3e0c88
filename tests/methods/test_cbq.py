"""CBQ on a small model: what it trains, what it hands on, and that it is worth it."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cbq_runs import CALIBRATION, W2A16, run, same

from harness.errors import BadOutput, HarnessError
from harness.kernels.execute import kernel_modules, packed_layers
from harness.method import QuantizedWindow
from harness.methods.cbq import CBQ
from harness.methods.cbq_objective import Text
from harness.methods.cbq_rounding import RoundedWeight, inverse_rectified_sigmoid
from harness.methods.cbq_student import Student
from harness.models import LoadedModel, load_model
from harness.quantized import QuantizedModel
from harness.quantizer import WeightFormat, decode, encode, expand, find_grid
from harness.settings import Setting
from harness.simulation import simulate
from harness.window import Window


@pytest.mark.parametrize(
    "setting", ["W4A16g16", "W4A16", "W3A16", "W2A16g16", "W2A16", "W4A8", "W4A4", "W4A4g16", "W4A8KV4", "W4A16g16sym"]
)
def test_every_setting_gives_a_model_that_runs(tiny_model: LoadedModel, tmp_path: Path, setting: str) -> None:
    result = run(tiny_model, CBQ(epochs=1), tmp_path, setting)
    assert tuple(result.linears) == tiny_model.architecture.linears
    rows = {row["layer"]: row for row in result.report}
    assert rows.keys() == result.linears.keys()
    assert all(math.isfinite(row["held_out"]) and row["flipped"] < 0.5 for row in rows.values())
    assert all(("clip" in row) == ("A16" not in setting) for row in rows.values())


LORA = {"rounding": "lora", "rounding_lr": 0.01}  # at 0.03 five columns flip whole patterns of weights at once


@pytest.mark.parametrize("options", [{}, {"size": 2}, {"init": "rtn"}, {"rounding": "none"}, LORA])
def test_windows_answer_better_on_unseen_text(tiny_model: LoadedModel, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each window, hardened and unguarded, against where it started."""
    report = run(tiny_model, CBQ(epochs=2, guard=False, **options), tmp_path).report
    assert all(row["held_out"] < row["held_out_before"] for row in report)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 2, "rounding": "full"},
        {"size": 2, "rounding": "lora", "relaxation": "soft", "homologous_target": 1.0, "kl": 0.1},
        {"size": 2, "rounding": "none", "init": "rtn"},
    ],
)
def test_resumed_between_windows_bit_equal(four_blocks: LoadedModel, tmp_path: Path, options: dict[str, Any]) -> None:
    method = CBQ(epochs=1, **options)
    whole = run(four_blocks, method, tmp_path / "whole", "W4A8")

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(four_blocks, method, tmp_path / "stopped", "W4A8", progress=stop)
    torch.randn(17)
    assert same(run(four_blocks, method, tmp_path / "stopped", "W4A8"), whole)


def test_progress_tells_both_losses_and_what_is_undecided(tiny_model: LoadedModel, tmp_path: Path) -> None:
    told: list[str] = []
    run(tiny_model, CBQ(epochs=1), tmp_path, progress=lambda stage, done, total, detail="": told.append(detail))
    blocks = range(len(tiny_model.architecture.blocks))
    steps = [f"model.layers.{i}: step 1 of " for i in blocks]
    assert all(any(line.startswith(step) and line.endswith("undecided") for line in told) for step in steps)
    number = r"\d+\.\d{4}"
    both = rf"model\.layers\.\d+: loss soft {number}, hard {number} on unseen text \(before {number}\), \d+% undecided"
    assert sum(re.fullmatch(both, line) is not None for line in told) == len(blocks)


def test_what_is_exported_runs_through_kernels(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Packed, and multiplied by the processor's own operators for integers: the linears that were trained."""
    operators = set()
    for setting, tolerance in (("W4A16g32", 8e-3), ("W4A8", 2e-5)):
        trained = run(tiny_model, CBQ(epochs=1), tmp_path / setting, setting).linears
        modules = kernel_modules(packed_layers(trained), tiny_model.architecture.shared_inputs, tiny_model.device)
        for name, path in modules.items():
            x = torch.randn(5, trained[name].codes.shape[1], generator=torch.Generator().manual_seed(0))
            (simulated,) = simulate({name: trained[name]}, [(name,)], torch.float32).values()
            assert (path(x) - simulated(x)).norm() / simulated(x).norm() < tolerance, name
            operators.add(path.path.operator(5))
    assert len(operators) == 2 and not any("dequantized" in operator for operator in operators)


def test_same_seed_same_integers(tiny_model: LoadedModel, tmp_path: Path) -> None:
    method = CBQ(epochs=1)
    assert same(run(tiny_model, method, tmp_path / "a"), run(tiny_model, method, tmp_path / "b"))


@dataclass(frozen=True)
class Watched(CBQ):
    """Keeps what each window saw and gave."""

    seen: list[Any] = field(default_factory=list)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        part = super().quantize(window, setting)
        self.seen.append((window, part))
        return part


def test_the_quantized_stream_is_that_of_what_ships(four_blocks: LoadedModel, tmp_path: Path) -> None:
    """A soft block ahead of a window would give it inputs that never occur."""
    method = Watched(size=2, epochs=1)
    result = run(four_blocks, method, tmp_path)
    for window, _ in method.seen[1:]:
        before = four_blocks.architecture.blocks[: window.index]
        (x,) = method.seen[0][0].quantized.chunks
        with window.runner.installed(QuantizedWindow(result.linears), before):
            for block in before:
                x = window.runner.block(block, x)
        torch.testing.assert_close(window.quantized.chunks[0], x, rtol=0, atol=0)


def test_shared_blocks_go_on_where_they_were(four_blocks: LoadedModel, tmp_path: Path) -> None:
    method = Watched(size=2, epochs=1, rounding_lr=0.0, scale_lr=0.05, guard=False)
    run(four_blocks, method, tmp_path)
    shared = four_blocks.architecture.blocks[1].linears[0]
    first, second = (method.seen[i][1].linears[shared] for i in (0, 1))
    carried = method.seen[1][0].carried
    assert torch.equal(carried[f"{shared}|base"] + (carried[f"{shared}|logits.v"] >= 0), first.codes)
    assert torch.equal(first.codes, second.codes)  # nothing rounds them anew
    assert not torch.equal(first.scales, second.scales)  # and training goes on
    assert not any(key.startswith("model.layers.0.") for key in carried)


@pytest.mark.parametrize("commits", ["leaving", "all"])
def test_commitment_acts_on_leaving_blocks_alone(four_blocks: LoadedModel, tmp_path: Path, commits: str) -> None:
    """Where D has reached 0 or 1 its gradient is gone: a block that is to be trained again is not hardened, unasked."""
    four_blocks.module.model.layers = four_blocks.module.model.layers[:3]
    four_blocks.module.config.num_hidden_layers = 3
    options = {"size": 2, "relaxation": "soft", "init": "rtn", "guard": False, "epochs": 10}
    method = Watched(rounding_lr=0.1, commits=commits, **options)
    run(four_blocks, method, tmp_path)
    undecided = {}
    for window, part in method.seen:
        for row in part.report:
            undecided[row["layer"], window.index] = row["undecided"]
    shared = four_blocks.architecture.blocks[1].linears
    if commits == "all":
        assert max(undecided[name, 0] for name in shared) < 0.02
    else:
        assert min(undecided[name, 0] for name in shared) > 0.5
        assert max(undecided[name, 1] for name in shared) < 0.02


def test_nothing_but_what_is_learned_is_touched(tiny_model: LoadedModel, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in tiny_model.module.named_parameters()}
    method = Watched(epochs=1)
    run(tiny_model, method, tmp_path)
    for name, parameter in tiny_model.module.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None and torch.equal(parameter, before[name])
    inputs = method.seen[0][0].quantized.chunks[0]
    assert torch.equal(inputs, tiny_model.module.model.embed_tokens(CALIBRATION))


def test_targets_are_the_models_own(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """With every weight exact both targets are met exactly: what is run is what is compared with."""

    @dataclass(frozen=True)
    class Exact(CBQ):
        def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
            text = Text.of(window, homologous=True)
            for i, example in enumerate(text.sequences):
                assert torch.equal(example.inputs, window.quantized.chunks[0][i : i + 1])
                if window.index == 0:
                    assert torch.equal(example.homologous, example.fp)
                    torch.testing.assert_close(window.forward(example.inputs), example.fp, rtol=1e-5, atol=1e-5)
                else:
                    assert not torch.equal(example.homologous, example.fp)
            return super().quantize(window, setting)

    run(tiny_model, Exact(epochs=1), tmp_path)


@pytest.mark.parametrize("rate", ["rounding_lr", "scale_lr", "clip_lr"])
def test_divergence_is_named(tiny_model: LoadedModel, tmp_path: Path, rate: str) -> None:
    """A V that is not a number makes integers all the same, and a finite loss."""
    with pytest.raises(BadOutput, match="diverged") as raised:
        run(tiny_model, CBQ(**{rate: math.nan}, epochs=2), tmp_path, "W4A4")
    assert "model.layers.0.self_attn.q_proj" in str(raised.value.where)


def test_steps_of_several_sequences_see_each_of_them_once_an_epoch(tiny_model: LoadedModel, tmp_path: Path) -> None:
    seen: list[list[int]] = []

    @dataclass(frozen=True)
    class Counted(CBQ):
        def batches(self, sequences: int) -> Iterator[list[int]]:
            for batch in super().batches(sequences):
                seen.append(batch)
                yield batch

    method = Counted(batch=3, epochs=2, guard=False)
    report = run(tiny_model, method, tmp_path).report
    assert [len(batch) for batch in seen[:3]] == [3, 3, 2] and len(seen) == 2 * 3 * 2
    assert sorted(i for batch in seen[:3] for i in batch) == list(range(8))
    assert all(row["held_out"] < row["held_out_before"] for row in report)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_of_float16_models_come_through(
    tiny_folder: Path, tmp_path: Path, precision: Literal["float32", "bfloat16"]
) -> None:
    """float16 has no number for most of the gradient of a small loss; beside bfloat16 products either."""
    flipped = []
    for l2 in (1.0, 1e-4):
        model = load_model(tiny_folder, name="tiny", dtype="float16", device="cpu")
        method = CBQ(epochs=2, guard=False, l2=l2, precision=precision)
        report = run(model, method, tmp_path / str(l2)).report
        assert all(row["held_out"] < row["held_out_before"] for row in report)
        flipped.append(sum(row["flipped"] for row in report))
    assert flipped[1] == pytest.approx(flipped[0], rel=0.1)


def test_mixed_precision_learns_as_well(tiny_model: LoadedModel, tmp_path: Path) -> None:
    options = {"epochs": 2, "guard": False, "rounding": "lora", "rounding_lr": 0.01}
    report = run(tiny_model, CBQ(**options, precision="bfloat16"), tmp_path).report
    assert all(row["held_out"] < row["held_out_before"] for row in report)


def test_what_was_learned_before_is_handed_on_by_a_window_that_learns_nothing(
    four_blocks: LoadedModel, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class SecondSpoilt(Watched):
        def train(self, window: Window, student: Student, text: Text) -> dict[str, float]:
            losses = super().train(window, student, text)
            if window.index == 1:
                for parameter in student.parameters()[0]:
                    parameter.data.neg_()  # everything is rounded the other way
            return losses

    method = SecondSpoilt(size=3, epochs=1)
    run(four_blocks, method, tmp_path)
    (_, one), (window, two) = method.seen
    assert not any(row["kept_initialization"] for row in one.report)
    assert all(row["kept_initialization"] for row in two.report)
    stays = {key: value for key, value in one.state.items() if key.partition("|")[0] in window.staying}
    assert two.state.keys() == stays.keys() and all(torch.equal(two.state[key], stays[key]) for key in stays)


def on_a_grid(model: LoadedModel, setting: Setting) -> None:
    """Weights that the quantizer of ``setting`` does not change."""
    for name in model.architecture.linears:
        linear = model.module.get_submodule(name)
        rounded = linear.weight + 1
        while not torch.equal(rounded, linear.weight):  # until the ends of every range are levels, too
            grid = find_grid(linear.weight, WeightFormat.of(setting))
            rounded, linear.weight.data = linear.weight.data, decode(encode(linear.weight, grid), grid)


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_to_correct_is_nothing_corrected(tiny_model: LoadedModel, tmp_path: Path, size: int) -> None:
    """Weights that are exact already: no error at any window, and one stream is the other, to the last bit.

    The student runs one sequence at a time and the targets were made several at a time: their last bits may differ.
    """
    on_a_grid(tiny_model, Setting.parse("W8A16"))
    exact = {"precision": "float32", "scale_lr": 0.0}
    options = {"init": "rtn", "rounding": "none", "guard": False, "epochs": 1, **exact}
    method = Watched(size=size, homologous_target=1.0, kl=1.0, **options)
    run(tiny_model, method, tmp_path, "W8A16")
    for window, part in method.seen:
        for quantized, untouched in zip(window.quantized.chunks, window.full_precision.chunks, strict=True):
            assert torch.equal(quantized, untouched)
        for row in part.report:
            assert max(row["l2_fp"], row["l2_homologous"]) < 1e-10
            assert max(abs(row["kl_fp"]), abs(row["kl_homologous"]), row["held_out_before"]) < 1e-6


def by_hand(window: Window, text: Text, epochs: int, rates: tuple[float, float]) -> float:
    """Block-wise training with plain autograd: one window's blocks, squared error, full rounding. The last loss."""
    parameters: list[tuple[torch.Tensor, torch.Tensor]] = []
    modules: dict[str, torch.nn.Module] = {}

    class Rounded(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            grid = find_grid(weight, WeightFormat.of(W2A16))
            self.scales, zeros = (t.clone() for t in expand(grid, weight.shape))
            exact = (weight / self.scales + zeros).clamp(0, 3)
            self.low, self.zeros = exact.floor().clamp(max=2), zeros
            self.v = inverse_rectified_sigmoid((exact - self.low).clamp(1e-4, 1 - 1e-4)).requires_grad_()
            self.s = torch.zeros(grid.scales.shape, requires_grad=True)
            parameters.append((self.v, self.s))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            soft = torch.sigmoid(self.v) * 1.2 - 0.1
            d = soft + ((self.v >= 0).float() - soft).detach()
            ratio = (2 * torch.sigmoid(self.s)).repeat_interleave(16, dim=1)
            return torch.nn.functional.linear(x, (self.low + d - self.zeros) * self.scales * ratio)

    for name, linear in window.linears.items():
        modules[name] = Rounded(linear.weight)
    groups = [{"params": list(part), "lr": lr} for part, lr in zip(zip(*parameters, strict=True), rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps, losses, step = epochs * len(text), [], 0
    for _ in range(epochs):
        for i in torch.randperm(len(text)).tolist():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            example, step = text.sequences[i], step + 1
            with torch.enable_grad():
                outputs = window.forward_through(example.inputs, modules)
                loss = (outputs - example.fp).square().mean() / text.mean_square
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    smoothed = losses[0]
    for loss in losses:
        smoothed = 0.9 * smoothed + 0.1 * loss
    return smoothed


def test_one_block_alone_is_trained_as_a_plain_loop_would(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Windows of one block, no second target, no divergence, no low rank: the same loss after the same steps."""

    @dataclass(frozen=True)
    class BesideTheLoop(CBQ):
        def train(self, window: Window, student: Student, text: Text) -> dict[str, float]:
            state = torch.get_rng_state()
            expected = by_hand(window, text, self.epochs, (self.rounding_lr, self.scale_lr))
            torch.set_rng_state(state)
            losses = super().train(window, student, text)
            assert losses["loss"] == pytest.approx(expected, rel=1e-3)
            return losses

    plain = {"init": "rtn", "token_norm": 0.0, "guard": False, "epochs": 2, "precision": "float32"}
    run(tiny_model, BesideTheLoop(**plain), tmp_path)


def test_what_is_saved_computes_what_was_trained(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Rotated, clipped and packed into a file: the model read back answers as the one in memory."""
    result = run(tiny_model, CBQ(epochs=1, rotate="hadamard"), tmp_path / "w", "W4A4KV4")
    result.save(tmp_path / "model.safetensors")
    again = QuantizedModel.load(tmp_path / "model.safetensors")
    answers = []
    for model in (result, again):
        copy_ = copy.deepcopy(tiny_model)
        model.install(copy_.module, copy_.architecture)
        with torch.no_grad():
            answers.append(copy_.module(CALIBRATION[:2]).logits)
    assert torch.equal(*answers)


def test_commitment_does_not_fade_with_the_number_of_weights() -> None:
    """The commitment is measured against the loss: ten times as many weights are pulled as hard each."""
    pulls = []
    for size in (64, 640):
        weight = torch.randn(size, 16, generator=torch.Generator().manual_seed(0))
        rounded = RoundedWeight.start(weight, find_grid(weight, WeightFormat.of(W2A16)), "full", 0)
        (v,) = rounded.parameters()
        v.grad = torch.full_like(v, 1e-3)
        rounded.commit(2.0, 1.0)
        pulls.append(float((v.grad - 1e-3).abs().mean()))
    assert pulls == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2}, {"holdout": 0}, {"size": 2, "stride": 0}, {"epochs": 0}, {"batch": 0}, {"fp_target": 0.0},
        {"l2": 0.0},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    assert CBQ(**options).supports(W2A16)
    assert CBQ().supports(W2A16) is None


def test_too_little_text_is_named(tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="none to train on"):
        run(tiny_model, CBQ(holdout=10), tmp_path)
