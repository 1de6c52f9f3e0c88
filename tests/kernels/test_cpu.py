"""Packed layers through torch's operators, against the integers that they stand for."""

import pytest
import torch
from checks import exact_product, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import random_layer

from harness.errors import BadOutput, Unsupported
from harness.kernels import cpu
from harness.kernels.cpu import DequantizedWeights, Int4Weights, IntegerProduct, cpu_path
from harness.kernels.execute import kernel_modules
from harness.kernels.pack import pack
from harness.kernels.paths import Product
from harness.kernels.precision import check_precision
from harness.linear import round_to_nearest
from harness.quantizer import ActivationSpec, simulate_tokens
from harness.settings import Setting


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 80),
    st.integers(1, 300),
    st.sampled_from([ActivationSpec(8), ActivationSpec(4), ActivationSpec(8, True, 0.9)]),
    st.booleans(),
    st.booleans(),
)
def test_integer_product(count: int, out: int, inputs: int, spec: ActivationSpec, symmetric: bool, bias: bool) -> None:
    """torch's, which runs without a C compiler."""
    linear = random_layer(out, inputs, symmetric=symmetric, bias=bias, extreme=True, activation=spec)
    path = IntegerProduct.of(pack(linear))
    x = rows(count, inputs, seed=out)
    exact, y = exact_product(x, spec, linear), path(x)
    # Sums that float32 holds exactly, but scaled before the zero points are taken off.
    scale = float((simulate_tokens(x, spec).abs() @ linear.weight().abs().T).max())
    assert torch.allclose(y, exact, rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights(group: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within bfloat16's rounding of the input, the scale, the offset and the output."""
    monkeypatch.setattr(cpu.native, "unavailable", lambda: "not wanted here")
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)
    torch.manual_seed(0)
    linear = round_to_nearest(torch.randn(48, 256), Setting.parse(f"W4A16g{group}"), bias=torch.randn(48))
    path = cpu_path(pack(linear))
    assert isinstance(path, Int4Weights)
    x = torch.randn(count, 256)
    exact = x @ linear.weight().T + linear.bias
    assert ((path(x) - exact).norm() / exact.norm()).item() < 8e-3


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ({"bits": 2}, None),
        ({"bits": 8, "group": 64}, None),
        ({"axis": "ic"}, None),
        ({"axis": "ic"}, ActivationSpec(8)),
    ],
)
def test_the_rest_is_dequantized(kind, activation) -> None:
    linear = random_layer(64, 128, activation=activation, **kind)
    path = cpu_path(pack(linear))
    assert isinstance(path, DequantizedWeights) and "dequantized" in path.operator(1)
    x = torch.randn(5, 128)
    exact = (x if activation is None else simulate_tokens(x, activation)) @ linear.weight().T
    assert ((path(x) - exact).norm() / exact.norm()).item() < 8e-3


def test_no_integer_operator_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.native, "unavailable", lambda: "not wanted here")
    with pytest.raises(Unsupported, match="groups of 64"):
        cpu_path(pack(random_layer(64, 128, group=64, activation=ActivationSpec(8))))


def test_eight_bit_weights_run_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pack(random_layer(64, 128, bits=8, symmetric=True, activation=ActivationSpec(8)))
    monkeypatch.setattr(cpu.native, "unavailable", lambda: "not wanted here")
    monkeypatch.setattr(cpu, "exact_with_bytes", lambda: False)
    with pytest.raises(Unsupported, match="16 bits"):
        cpu_path(layer)


def test_eight_bit_weights_less_their_zero_points_do_not_fit_into_signed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.native, "unavailable", lambda: "not wanted here")
    monkeypatch.setattr(cpu, "exact_with_bytes", lambda: True)
    with pytest.raises(Unsupported, match="signed bytes"):
        cpu_path(pack(random_layer(64, 128, bits=8, activation=ActivationSpec(8))))


def test_what_ran_is_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        "a": random_layer(64, 128, group=64),
        "b": random_layer(64, 128, activation=ActivationSpec(8)),
        "c": random_layer(64, 128, bits=2),
    }
    packed = {name: pack(layer) for name, layer in layers.items()}
    modules = kernel_modules(packed, [(name,) for name in packed], torch.device("cpu"))
    assert sum(check_precision(modules, [1, 64], torch.float32).values()) == 6
    declared = Product("aten::_weight_int4pack_mm_for_cpu", torch.uint8)
    monkeypatch.setattr(type(modules["b"].path), "product", lambda self, rows, dtype: declared)
    with pytest.raises(BadOutput, match="b declares"):
        check_precision(modules, [1], torch.float32)
