import pytest
import torch

from harness.errors import BadOutput
from harness.linear import QuantizedLinear, round_to_nearest
from harness.quantizer import ActivationSpec, WeightFormat, encode_tokens, simulate_tokens
from harness.settings import Setting
from harness.simulation import IntegerLinear, SimulatedLinear, scored, simulate
from harness.transform import BlockRotation, InputTransform, Permutation


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def transform(channels: int = 64, block: int = 16) -> InputTransform:
    generator = torch.Generator().manual_seed(1)
    return InputTransform(
        smooth=torch.rand(channels, generator=generator) + 0.5,
        steps=(
            BlockRotation(orthogonal(block, 2)),
            Permutation(torch.randperm(channels, generator=generator)),
            BlockRotation(orthogonal(block, 3)),
        ),
    )


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(9))


def test_transform_leaves_the_product_as_it_was(weight: torch.Tensor, x: torch.Tensor) -> None:
    t = transform()
    torch.testing.assert_close(t.apply(x) @ t.fold(weight).T, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_transform_does_not_touch_its_input_nor_mix_rows(x: torch.Tensor) -> None:
    before, t = x.clone(), transform()
    whole = t.apply(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(whole[1], t.apply(x[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["W4A16g16", "W8A8", "W4A4sym", "W2A16g16", "W3A16"])
def test_simulation_multiplies_what_the_integers_stand_for(weight: torch.Tensor, x: torch.Tensor, setting: str) -> None:
    bias = torch.arange(48.0)
    q = round_to_nearest(weight, Setting.parse(setting), bias=bias, transform=transform())
    module = simulate({"a": q}, [("a",)], torch.float32)["a"]
    assert q.transform is not None
    inputs = q.transform.apply(x)
    if q.activation:
        inputs = simulate_tokens(inputs, q.activation)
    scales, zeros = (t.float().repeat_interleave(q.group_size, dim=1) for t in (q.scales, q.zeros))
    expected = inputs @ ((q.codes.float() - zeros) * scales).T + bias
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)


def test_linears_that_share_an_input_prepare_it_once(weight: torch.Tensor, x: torch.Tensor) -> None:
    setting = Setting.parse("W4A8")
    linears = {name: round_to_nearest(weight + i, setting) for i, name in enumerate("qkv")}
    modules = simulate(linears, [("q", "k", "v")], torch.float32)
    calls = 0
    prepare = modules["q"].prepare
    assert prepare is not None and prepare is modules["k"].prepare is modules["v"].prepare
    original = prepare.prepare

    def counted(value: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(value)

    prepare.prepare = counted  # type: ignore[method-assign]
    first = {name: module(x) for name, module in modules.items()}
    assert calls == 1
    later = x + 1
    other = {name: module(later) for name, module in modules.items()}
    assert calls == 2
    for name, q in linears.items():
        alone = SimulatedLinear(q, simulate({name: q}, [(name,)], torch.float32)[name].prepare, torch.float32)
        assert torch.equal(first[name], alone(x)) and torch.equal(other[name], alone(later))
    assert prepare._source is None and prepare._prepared is None  # no activation is kept alive


@pytest.mark.parametrize("setting", ["W4A8", "W4A4sym", "W2A8", "W4A16", "W4A8g16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_scored_multiplies_integers_where_their_sums_are_exact(
    weight: torch.Tensor, x: torch.Tensor, setting: str, dtype: torch.dtype
) -> None:
    """To the bit as int64 does, scales last; everything else is as it is while a model is quantized."""
    parsed, bias = Setting.parse(setting), torch.arange(48.0)
    linears = {name: round_to_nearest(weight + i, parsed, bias=bias) for i, name in enumerate("qk")}
    modules = scored(linears, [("q", "k")], dtype)
    floats = simulate(linears, [("q", "k")], dtype)
    assert modules["q"].prepare is modules["k"].prepare
    for name, q in linears.items():
        y = modules[name](x.to(dtype))
        if dtype == torch.float32 and setting not in ("W4A16", "W4A8g16"):
            assert q.activation is not None
            codes, scale, zero = encode_tokens(x, q.activation)
            sums = (codes.long() - zero.long()) @ (q.codes.long() - q.zeros.long()).T
            assert torch.equal(y, sums.float() * q.scales[:, 0].float() * scale + bias)
            torch.testing.assert_close(y, floats[name](x), rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(y, floats[name](x.to(dtype)))


def test_some_of_a_shared_input_may_be_integers(weight: torch.Tensor, x: torch.Tensor) -> None:
    setting = Setting.parse("W4A8")
    linears = {
        "oc": round_to_nearest(weight, setting),
        "ic": round_to_nearest(weight, setting, format=WeightFormat(4, 48, axis="ic")),
    }
    modules = scored(linears, [("oc", "ic")], torch.float32)
    assert isinstance(modules["oc"], IntegerLinear) and isinstance(modules["ic"], SimulatedLinear)
    for name, q in linears.items():
        right = simulate({name: q}, [(name,)], torch.float32)[name](x)
        torch.testing.assert_close(modules[name](x), right, rtol=1e-5, atol=1e-4)


def test_axis_ic_weight(weight: torch.Tensor) -> None:
    q = round_to_nearest(weight, Setting.parse("W4A16g16"), format=WeightFormat(4, 16, axis="ic"))
    assert tuple(q.scales.shape) == (3, 64)
    assert float((q.weight() - weight).square().mean() / weight.square().mean()) < 0.01


def parts() -> dict[str, object]:
    return {
        "codes": torch.zeros(4, 8, dtype=torch.uint8),
        "scales": torch.ones(4, 2, dtype=torch.float16),
        "zeros": torch.zeros(4, 2, dtype=torch.uint8),
        "bits": 4,
        "group_size": 4,
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"codes": torch.full((4, 8), 16, dtype=torch.uint8)}, "a code is 16, beyond 4 bits"),
        ({"zeros": torch.full((4, 2), 16, dtype=torch.uint8)}, "a zero point is 16, beyond 4 bits"),
        ({"scales": torch.full((4, 2), torch.nan, dtype=torch.float16)}, "a scale is not a finite positive number"),
        ({"scales": torch.zeros(4, 2, dtype=torch.float16)}, "a scale is not a finite positive number"),
        (
            {"scales": torch.ones(2, 2, dtype=torch.float16), "zeros": torch.zeros(2, 2, dtype=torch.uint8)},
            r"scales are torch.float16 \[2, 2\], not torch.float16 \[4, 2\]",
        ),
    ],
)
def test_a_layer_that_breaks_its_own_bits_cannot_be_made(change: dict[str, object], complaint: str) -> None:
    QuantizedLinear(**parts())  # type: ignore[arg-type]
    with pytest.raises(BadOutput, match=complaint):
        QuantizedLinear(**(parts() | change))  # type: ignore[arg-type]


def test_nan_weight_is_refused() -> None:
    with pytest.raises(BadOutput, match="scale is not a finite"):
        round_to_nearest(torch.full((4, 8), torch.nan), Setting.parse("W4A16"))


def test_activation_spec_of_setting() -> None:
    assert ActivationSpec.of(Setting.parse("W4A16")) is None
    assert ActivationSpec.of(Setting.parse("W4A8sym"), clip=0.9) == ActivationSpec(8, True, 0.9)
