"""The student: what it computes is what ships, and activation clipping learns."""

import math

import pytest
import torch
from torch import nn

from harness.attention import AttentionSpec
from harness.method import QuantizedWindow
from harness.methods.cbq_rounding import RoundedWeight
from harness.methods.cbq_student import LearnedInput, StraightThroughAttention, Student, StudentInput
from harness.quantizer import ActivationSpec, WeightFormat, find_grid, simulate_tokens
from harness.settings import Setting
from harness.simulation import simulate
from harness.transform import block_hadamard


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(setting: Setting) -> Student:
    weights = {}
    for i, name in enumerate("qk"):
        weight = random(8, 32, seed=i)
        weights[name] = RoundedWeight.start(weight, find_grid(weight, WeightFormat.of(setting)), "full", 0)
        with torch.no_grad():
            weights[name].v_scale.add_(0.1 * random(*weights[name].v_scale.shape, seed=i + 2))
    learned = LearnedInput(("q", "k"), ActivationSpec.of(setting), None, nn.Parameter(torch.tensor(-0.5)))
    return Student(weights, (learned,), {"q": random(8, seed=5), "k": None}, QuantizedWindow({}), setting)


@pytest.mark.parametrize("setting", ["W4A16g16", "W2A16", "W4A8", "W4A4", "W4A4sym"])
def test_a_straight_through_pass_is_the_one_that_ships(setting: str) -> None:
    """Up to the last bits: scales are rounded to float16 when they are stored."""
    s = student(Setting.parse(setting))
    for weight in s.weights.values():
        weight.grid.scales.copy_(2.0 ** weight.grid.scales.log2().round())
        weight.v_scale.data.zero_()  # scales that float16 holds exactly
    x = random(2, 5, 32, seed=7)
    trained, shipped = s.modules("straight_through"), simulate(s.hardened().linears, [("q", "k")], torch.float32)
    for name in "qk":
        assert torch.equal(trained[name](x), shipped[name](x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_has_the_gradient_of_a_learned_step(symmetric: bool) -> None:
    """d x̂/d ratio = s/ratio · (q − x/s inside the range, q outside); rounding itself is passed straight through."""
    spec = ActivationSpec(4, symmetric)
    learned = LearnedInput(("q",), spec, None, nn.Parameter(torch.tensor(-0.5)))
    x = random(6, 32).requires_grad_()
    upstream = random(6, 32, seed=1)
    (StudentInput(learned)(x) * upstream).sum().backward()

    ratio = (2 * torch.sigmoid(torch.tensor(-0.5))).requires_grad_()
    y = x.detach().clone().requires_grad_()
    lo, hi = y.detach().amin(-1, keepdim=True).clamp(max=0), y.detach().amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    scale = (hi - lo) / 15 * ratio
    zero = torch.full_like(scale, 8) if symmetric else (-lo * ratio / scale).round().detach()
    exact = y / scale
    rounded = exact + (exact.round() - exact).detach()
    bound = exact.detach().round().clamp(-zero, 15 - zero)
    quantized = torch.where(exact.round() == bound, rounded, bound) * scale
    (quantized * upstream).sum().backward()
    clip = learned.clip()
    torch.testing.assert_close(quantized, simulate_tokens(x.detach(), ActivationSpec(4, symmetric, clip)))
    torch.testing.assert_close(x.grad, y.grad)
    assert ratio.grad is not None and learned.rho.grad is not None
    torch.testing.assert_close(learned.rho.grad, ratio.grad * clip * (1 - clip / 2))


def test_no_range_grows_beyond_the_tokens_own() -> None:
    s = student(Setting.parse("W4A4"))
    s.constrain()
    assert s.inputs[0].rho.tolist() == -0.5
    s.inputs[0].rho.data.fill_(0.3)
    s.constrain()
    assert s.inputs[0].clip() == 1


def test_a_shared_input_is_prepared_once() -> None:
    s = student(Setting.parse("W4A4"))
    calls = []
    modules = s.modules("soft")
    prepare = modules["q"].prepare
    assert prepare is modules["k"].prepare
    plain = prepare.quantize
    prepare.quantize = lambda x, spec: (calls.append(1), plain(x, spec))[1]
    x = random(2, 5, 32)
    (modules["q"](x).sum() + modules["k"](x).sum()).backward()
    assert len(calls) == 1
    rho = s.inputs[0].rho
    assert rho.grad is not None and rho.grad != 0


def test_state_is_only_that_of_the_linears_asked_for() -> None:
    s = student(Setting.parse("W4A4"))
    assert {key.partition("|")[0] for key in s.state(["q"])} == {"q"}
    assert float(s.state(["q", "k"])["q|rho"]) == -0.5
    assert s.state([]) == {}


def test_the_report_says_what_training_did() -> None:
    s = student(Setting.parse("W4A4"))
    before = s.hardened().linears
    s.weights["q"].parameters()[0].data[0].mul_(-1)
    row = s.described("q", before["q"])
    assert row["flipped"] == pytest.approx(1 / 8, abs=0.01)
    assert s.described("k", before["k"])["flipped"] == 0
    assert row["clip"] == pytest.approx(2 / (1 + math.exp(0.5)))
    assert 0.5 < row["scale_min"] < 1 < row["scale_max"] < 1.5


def test_gradients_pass_the_rounding_of_keys_and_values() -> None:
    spec = AttentionSpec(ActivationSpec(4), block_hadamard(16))
    inputs = [random(2, heads, 5, 16, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2))]
    through = StraightThroughAttention(spec.kv, spec.rotation).apply(*inputs)
    for one, other in zip(through, spec.apply(*(x.detach() for x in inputs)), strict=True):
        assert torch.equal(one, other)
    sum(x.sum() for x in through).backward()
    torch.testing.assert_close(inputs[2].grad, torch.ones_like(inputs[2]))
    assert inputs[1].grad is not None and (inputs[1].grad != 0).any()
