"""Our C kernel for W4A16 against float64: what fixed point may change, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layers import random_layer

from harness.errors import Unsupported
from harness.kernels import cpu, fixedpoint, native, paths
from harness.kernels.cpu import FixedPointWeights, cpu_path
from harness.kernels.execute import KernelInput, KernelLinear
from harness.kernels.pack import pack
from harness.kernels.precision import check_precision
from harness.linear import QuantizedLinear

TINIEST = 1e-30  # a block's largest activation counts as this at least
INPUTS = ("normal", "zeros", "huge", "tiny", "smallest", "outlier", "largest")


def activations(kind: str, count: int, inputs: int) -> torch.Tensor:
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(inputs))
    if kind == "outlier":
        x[:, inputs // 3] *= 1e4
    if kind == "largest":  # both ends of the fixed point, in every place
        x = x.sign() * 3.0
    return x * {"zeros": 0.0, "huge": 1e30, "tiny": 1e-32, "smallest": 1e-42}.get(kind, 1.0)


def within_fixed_point(y: torch.Tensor, x: torch.Tensor, linear: QuantizedLinear, block: int) -> None:
    """Half a step for every activation, and float32's rounding of a sum over blocks."""
    weight = linear.weight().double()
    exact = x.double() @ weight.T
    padding = (0, -x.shape[1] % block)
    blocks = torch.nn.functional.pad(x.double(), padding).reshape(len(x), -1, block)
    steps = blocks.abs().amax(2).clamp(min=TINIEST) / 32767
    absolute = torch.nn.functional.pad(weight.abs(), padding).reshape(len(weight), -1, block).sum(2)
    rounding = (blocks.shape[1] + 3) * 2.0**-24 * ((x.double().abs() @ weight.abs().T) + steps @ absolute.T)
    excess = (y.double() - exact).abs() - (0.51 * steps @ absolute.T + rounding)
    assert excess.max() <= 0, f"off by {excess.max():.3g} beyond the bound"


@pytest.mark.usefixtures("runs", "forgotten")
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 17])
def test_wide_registers_give_the_bits_of_narrow_ones(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same lanes, in the same order."""
    if len(native.levels()) < 2:
        pytest.skip("this processor has no AVX-512 with VNNI")
    path = FixedPointWeights.of(pack(random_layer(50, 320, group=64)))
    x = activations("outlier", rows, 320)
    wide = path(x)
    monkeypatch.setattr(native, "levels", lambda: [()])
    native.library.cache_clear()
    assert torch.equal(path(x), wide)


@pytest.mark.usefixtures("runs")
@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([32, 64, 128, 256, 384, None]),
    st.integers(1, 3),
    st.integers(1, 300),
    st.booleans(),
    st.booleans(),
    st.sampled_from(INPUTS),
)
@example(4, 16, 128, 2, 1, False, True, "largest")  # the largest sums that there are
def test_within_half_a_step(
    count: int, out: int, group: int | None, groups: int, whole: int, symmetric: bool, extreme: bool, kind: str
) -> None:
    inputs = whole if group is None else group * groups
    linear = random_layer(out, inputs, group=group, symmetric=symmetric, extreme=extreme, seed=out)
    path = FixedPointWeights.of(pack(linear))
    x = activations(kind, count, inputs)
    y = path(x)
    assert y.dtype == torch.float32 and y.shape == (count, out)
    within_fixed_point(y, x, linear, fixedpoint.block_of(path.layer))


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("kind", "times"), [("normal", 50), ("outlier", 3)])
def test_nearer_than_bfloat16(kind: str, times: float) -> None:
    """Than rounding the activations alone would be, with the same weights in float64."""
    linear = random_layer(256, 512, group=128)
    weight, x = linear.weight().double(), activations(kind, 8, 512)
    exact = x.double() @ weight.T
    ours = (FixedPointWeights.of(pack(linear))(x).double() - exact).norm()
    bfloat16 = (x.bfloat16().double() @ weight.T - exact).norm()
    assert times * ours < bfloat16


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_bias(dtype: torch.dtype) -> None:
    """What comes out has the type of what went in, rounded once from float32, the bias included."""
    biased = random_layer(50, 96, bias=True)
    x = torch.randn(3, 96).to(dtype)
    y = FixedPointWeights.of(pack(biased))(x)
    plain = FixedPointWeights.of(pack(replace(biased, bias=None)))(x.float())
    assert biased.bias is not None and y.dtype == dtype
    assert torch.equal(y, (plain + biased.bias).to(dtype))


@pytest.mark.usefixtures("runs")
def test_bfloat16_ties_go_to_even() -> None:
    bias = torch.tensor([257.0, 259.0, -257.0, -259.0, 258.9])  # nine bits or more where there is room for eight
    path = FixedPointWeights.of(pack(replace(random_layer(5, 32), bias=bias)))
    assert torch.equal(path(torch.zeros(1, 32).bfloat16())[0], bias.bfloat16())


@pytest.mark.usefixtures("runs")
def test_bfloat16_keeps_what_is_not_finite() -> None:
    path, x = FixedPointWeights.of(pack(random_layer(20, 100))), torch.randn(2, 100).bfloat16()
    x[0, 7] = torch.inf
    y = path(x)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.usefixtures("runs")
def test_a_token_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fixedpoint, "_CODES_OF_A_PART", 1)  # or a layer as small as this has one part
    path, x = FixedPointWeights.of(pack(random_layer(130, 320, group=64))), torch.randn(11, 320)
    threads, together = torch.get_num_threads(), path(x)
    assert torch.equal(torch.cat([path(x[row : row + 1]) for row in range(11)]), together)
    try:
        torch.set_num_threads(3)
        assert torch.equal(path(x), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(path(x), together)


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 31, 99])
def test_what_is_not_finite_shows(value: float, column: int) -> None:
    """In every output of that token, and in no other token."""
    path, x = FixedPointWeights.of(pack(random_layer(20, 100))), torch.randn(6, 100)
    clean = path(x)
    x[2, column] = value
    y = path(x)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


@pytest.mark.usefixtures("runs")
def test_a_buffer_that_does_not_fit_is_refused() -> None:
    """Other sizes than those of the tensors, any other number in the header, a byte more or less."""
    path, x = FixedPointWeights.of(pack(random_layer(20, 128, group=32))), torch.randn(2, 128)
    product = fixedpoint.product
    product(x, path.buffer, 20)

    def refused(x: torch.Tensor, buffer: torch.Tensor, outputs: int) -> None:
        with pytest.raises(ValueError, match=r"no layer of|takes"):
            product(x, buffer, outputs)

    refused(x, path.buffer, 33)
    refused(x[:, :127], path.buffer, 20)
    refused(x.double(), path.buffer, 20)
    refused(x, path.buffer[:-1], 20)
    refused(x, path.buffer[:63], 20)
    refused(x, torch.cat([path.buffer, path.buffer[:1]]), 20)
    refused(x, path.buffer.view(torch.int8), 20)
    for field in range(6):
        for value in (-1, 0, 3, 16, 64, 1 << 40, -(1 << 63)):
            wrong = path.buffer.clone()
            wrong[:64].view(torch.int64)[field] = value
            refused(x, wrong, 20)


def alone(path: paths.Path) -> KernelLinear:
    return KernelLinear(path, KernelInput(path.given, 1))


@pytest.mark.usefixtures("runs")
def test_the_path_names_what_runs() -> None:
    path = FixedPointWeights.of(pack(random_layer(64, 128, group=64)))
    assert path.operator(1) == path.operator(64) == "w4a16_fixed_point"
    assert check_precision({"a": alone(path)}, [1, 64], torch.float32) == {"w4a16_fixed_point; given float32": 2}


@pytest.mark.usefixtures("runs")
def test_chosen_for_all_tokens_or_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside units for bfloat16 many tokens are worth dequantizing for."""
    linear = random_layer(64, 128, group=64)
    monkeypatch.setattr(cpu, "cpu", lambda: {"flags": ["avx2", "f16c", "fma"]})
    assert isinstance(cpu_path(pack(linear)), FixedPointWeights)
    assert isinstance(cpu_path(pack(random_layer(7, 33))), FixedPointWeights)
    monkeypatch.setattr(cpu, "cpu", lambda: {"flags": ["avx2", "amx_bf16", "f16c", "fma"]})
    path, most = cpu_path(pack(linear)), cpu.CODES_TOKENS_BESIDE_BF16_UNITS
    assert (path.operator(most), path.operator(most + 1)) == (fixedpoint.OPERATOR, "aten::mm of bfloat16, dequantized")
    exact = torch.randn(most + 1, 128)
    for rows in (most, most + 1):
        right = exact[:rows].double() @ linear.weight().double().T
        assert (path(exact[:rows]) - right).norm() / right.norm() < 8e-3
    assert len(check_precision({"a": alone(path)}, [1, most + 1], torch.float32)) == 2


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("without", ["compiler", "working compiler", "AVX2"])
def test_where_it_is_missing_torchs_operator_runs_and_is_named(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["f16c", "fma"] if without == "AVX2" else ["avx2", "f16c", "fma"]
    monkeypatch.setattr(native, "cpu", lambda: {"flags": flags})
    monkeypatch.setenv("CC", {"compiler": "no-such-cc", "working compiler": "false", "AVX2": "cc"}[without])
    reason = {"compiler": "no C compiler 'no-such-cc'", "working compiler": "fails", "AVX2": "no avx2"}[without]
    assert reason in (native.unavailable() or "")
    with pytest.raises(Unsupported, match=r"compiler|avx2"):
        native.library()
    path = cpu_path(pack(random_layer(64, 128, group=64)))
    assert path.operator(1) == cpu.INT4_OPERATOR
    assert check_precision({"a": alone(path)}, [1], torch.float32) == {f"{cpu.INT4_OPERATOR}; given bfloat16": 1}


@pytest.mark.usefixtures("runs", "forgotten")
def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    native.library()
    (made,) = (tmp_path / "native").iterdir()
    native.library.cache_clear()
    before = made.stat()
    native.library()
    (again,) = (tmp_path / "native").iterdir()
    assert again == made and (again.stat().st_ino, again.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
