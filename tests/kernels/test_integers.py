"""Our C kernels for products of integers, against the quantizer and against integers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import exact_product, rows
from hypothesis import example, given
from hypothesis import strategies as st
from layers import random_layer

from harness import provenance
from harness.errors import Unsupported
from harness.kernels import cpu, integers, native, paths
from harness.kernels.cpu import IntegerProduct, IntegerWeights, cpu_path
from harness.kernels.execute import KernelInput, KernelLinear
from harness.kernels.pack import pack
from harness.kernels.precision import check_precision
from harness.quantizer import ActivationSpec, encode_tokens

pytestmark = pytest.mark.usefixtures("runs")

KINDS = ("normal", "zeros", "outlier", "positive", "negative", "huge", "large", "small", "tiny", "smallest", "ties")
PRETENDED = "-DPRETENDED_TILES"


LEVELS = native.levels
NAMES = {
    "AVX2": "AVX2",
    "AVX-512": "AVX-512 and VNNI",
    "AMX": "AVX-512, VNNI and AMX",
    "tiles in plain C": "AVX-512, VNNI and AMX",
}


def forget() -> None:
    native.library.cache_clear()
    native.unavailable.cache_clear()


@pytest.fixture(scope="module", params=NAMES)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instructions that everything in the test is compiled for."""
    if reason := native.unavailable():
        pytest.skip(reason)
    *more, vnni, avx2 = ((), *LEVELS())[-3:]
    options = {"AVX2": avx2, "AVX-512": vnni, "AMX": more[0] if more else (), "tiles in plain C": (*vnni, PRETENDED)}
    if request.param != "AVX2" and not options[request.param][:1]:
        pytest.skip("this processor does not have them")
    native.levels = lambda: [options[request.param]]
    forget()
    try:
        if request.param == "AMX" and native.instructions() != NAMES["AMX"]:
            pytest.skip("the system does not let this process have tiles")
        assert native.instructions() == NAMES[request.param]
        yield request.param
    finally:
        native.levels = LEVELS
        forget()


@pytest.fixture(autouse=True)
def as_it_is(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is compiled is what this processor has, in a test that does not ask for a level."""
    if "level" in request.fixturenames:
        yield
        return
    before, native.levels = native.levels, LEVELS
    forget()
    yield
    native.levels = before
    forget()


def activations(kind: str, count: int, inputs: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    if kind == "outlier":
        x[:, inputs // 2] *= 1e4
    if kind == "ties":  # as near to the middle between two levels as floats are, but for the ends
        _, scale, _ = encode_tokens(x, ActivationSpec(8))
        middles = (torch.randint(-99, 99, x.shape, generator=generator) + 0.5) * scale
        beside = torch.nextafter(middles, torch.randn(x.shape, generator=generator) * torch.inf)
        middles = torch.where(torch.rand(x.shape, generator=generator) < 0.5, middles, beside)
        x = torch.maximum(torch.minimum(middles, x.amax(1, keepdim=True)), x.amin(1, keepdim=True))
    x = x.abs() if kind == "positive" else -x.abs() if kind == "negative" else x
    return (
        x * {"zeros": 0.0, "huge": 1e35, "large": 1e29, "small": 1e-26, "tiny": 1e-30, "smallest": 1e-41}.get(kind, 1.0)
    ).to(dtype)


@given(
    count=st.integers(1, 20),
    inputs=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    clip=st.sampled_from([1.0, 0.9, 1e-8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    group=st.sampled_from([None, 32, 64]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_quantizers(level, count, inputs, kind, bits, symmetric, clip, dtype, group, seed) -> None:
    inputs = inputs if group is None else -(-inputs // group) * group
    x, spec = activations(kind, count, inputs, dtype, seed), ActivationSpec(bits, symmetric, clip)
    group = group or -(-inputs // 64) * 64
    if not x.isfinite().all():
        return
    found = integers.encode(x, spec, group)
    codes, scale, zero = encode_tokens(x, spec)
    right = torch.nn.functional.pad(codes.int() - 128, (0, found.codes.shape[1] - inputs))
    assert torch.equal(found.scales, scale[:, 0]) and torch.equal(found.zeros, zero[:, 0].int() - 128)
    assert torch.equal(found.codes.int(), right)
    assert torch.equal(found.sums, right.reshape(count, -1, group).sum(2, dtype=torch.int32))


@given(
    count=st.integers(1, 45),
    out=st.integers(1, 200),
    inputs=st.integers(1, 900),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([None, 32, 64, 128]),
    spec=st.sampled_from([ActivationSpec(8), ActivationSpec(4), ActivationSpec(8, True, 0.9)]),
    symmetric=st.booleans(),
    bias=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(33, 65, 129, 4, None, ActivationSpec(8), False, True, True, 0)
@example(200, 64, 1024, 4, None, ActivationSpec(8), False, False, True, 1)  # more tokens than a block has
def test_products_are_those_of_integers(
    level, count, out, inputs, bits, group, spec, symmetric, bias, extreme, seed
) -> None:
    """Bit for bit what int64 gives, scaled in float32 in the order of the kernel on a GPU."""
    if bits > native.library().wna8_bits():
        return
    inputs = inputs if group is None else -(-inputs // group) * group
    linear = random_layer(
        out, inputs, bits=bits, group=group, symmetric=symmetric, bias=bias, extreme=extreme, activation=spec, seed=seed
    )
    x = rows(count, inputs, seed)
    assert torch.equal(IntegerWeights.of(pack(linear))(x), exact_product(x, spec, linear))


def test_the_largest_sums(level) -> None:
    """Every product at its end, which 16 bits hold for a while only, and 32 just so."""
    bits = native.library().wna8_bits()
    linear = random_layer(70, 33024, bits=bits, activation=ActivationSpec(8), extreme=True)
    for code, zero in ((2**bits - 1, 0), (0, 2**bits - 1)):
        ends = replace(linear, codes=torch.full_like(linear.codes, code), zeros=torch.full_like(linear.zeros, zero))
        for sign in (1.0, -1.0):
            x = torch.full((30, 33024), sign)
            assert torch.equal(IntegerWeights.of(pack(ends))(x), exact_product(x, ActivationSpec(8), ends))


def test_a_token_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(
    level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integers, "_CODES_OF_A_PART", 1)  # or a layer as small as this has one part
    monkeypatch.setattr(integers, "_VALUES_OF_A_PART", 16)
    path = IntegerWeights.of(pack(random_layer(300, 320, group=64, activation=ActivationSpec(8))))
    x = torch.randn(150, 320)
    threads, together = torch.get_num_threads(), path(x)
    assert torch.equal(torch.cat([path(x[row : row + 1]) for row in range(150)]), together)
    assert torch.equal(torch.cat([path(x[:30]), path(x[30:])]), together)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(path(x), together)
    finally:
        torch.set_num_threads(threads)


def test_tokens_that_do_not_lie_one_after_another() -> None:
    x, spec = torch.randn(6, 80)[::2, ::2], ActivationSpec(8)
    assert torch.equal(integers.encode(x, spec, 64).codes[:, :40].int() + 128, encode_tokens(x, spec)[0].int())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 7, 15, 16, 32])
def test_what_is_not_finite_stays_within_its_token(level, bad: float, at: int) -> None:
    path, x = IntegerWeights.of(pack(random_layer(5, 33, activation=ActivationSpec(8)))), torch.randn(3, 33)
    clean = path(x)
    x[1, at] = bad
    y = path(x)
    assert torch.isnan(y[1]).all() and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_a_buffer_that_does_not_fit_is_refused() -> None:
    """Other sizes than those of the tensors, any other number in the header, a byte more or less."""
    path = IntegerWeights.of(pack(random_layer(20, 128, group=32, activation=ActivationSpec(8))))
    x = path.given(torch.randn(2, 128))
    integers.product(x, path.buffer, 20)

    def refused(x: integers.Tokens, buffer: torch.Tensor, outputs: int) -> None:
        with pytest.raises(ValueError, match=r"no layer of|takes"):
            integers.product(x, buffer, outputs)

    refused(x, path.buffer, 65)
    refused(integers.encode(torch.randn(2, 96), ActivationSpec(8), 32), path.buffer, 20)
    refused(integers.encode(torch.randn(2, 128), ActivationSpec(8), 64), path.buffer, 20)
    refused(x._replace(codes=x.codes.view(torch.uint8)), path.buffer, 20)
    refused(x._replace(codes=x.codes.T.contiguous().T), path.buffer, 20)
    refused(x._replace(zeros=x.zeros.long()), path.buffer, 20)
    refused(x._replace(scales=x.scales[:1]), path.buffer, 20)
    refused(x._replace(sums=x.sums[:1]), path.buffer, 20)
    refused(x, path.buffer[:-1], 20)
    refused(x, path.buffer[:63], 20)
    refused(x, torch.cat([path.buffer, path.buffer[:1]]), 20)
    for field in range(6):
        for value in (-1, 0, 3, 16, 96, 1 << 40, -(1 << 63)):
            wrong = path.buffer.clone()
            wrong[:64].view(torch.int64)[field] = value
            refused(x, wrong, 20)


def test_sums_that_32_bits_may_not_hold_are_refused() -> None:
    """33,025 products of 255 and 255 are the most, in a group that is padded to 64."""
    for inputs, fits in ((33024, True), (33025, False)):
        layer = pack(random_layer(1, inputs, bits=8, activation=ActivationSpec(8)))
        if fits:
            assert len(integers.buffer_of(layer))
        else:
            with pytest.raises(Unsupported, match="more than 32 bits hold"):
                integers.buffer_of(layer)


def alone(path: paths.Path) -> KernelLinear:
    return KernelLinear(path, KernelInput(path.given, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_path_names_what_runs(dtype: torch.dtype) -> None:
    linear = random_layer(64, 128, group=64, activation=ActivationSpec(8))
    path = cpu_path(pack(linear))
    assert isinstance(path, IntegerWeights) and path.operator(1) == path.operator(64) == "wna8_integer"
    assert check_precision({"a": alone(path)}, [1, 64], dtype) == {"wna8_integer; given int8": 2}
    x = torch.randn(3, 128).to(dtype)
    assert torch.equal(path(x), exact_product(x, ActivationSpec(8), linear).to(dtype))


def test_without_a_compiler_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = random_layer(30, 70, bias=True, activation=ActivationSpec(8))
    ours, x = cpu_path(pack(linear)), torch.randn(5, 70)
    monkeypatch.setattr(native, "unavailable", lambda: "not wanted here")
    path = cpu_path(pack(linear))
    assert isinstance(path, IntegerProduct)
    torch.testing.assert_close(path(x), ours(x), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("forgotten")
def test_eight_bits_on_a_processor_without_vnni_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which refuses them there."""
    monkeypatch.setattr(native, "levels", lambda: [()])
    forget()
    monkeypatch.setattr(cpu, "exact_with_bytes", lambda: False)
    layer = pack(random_layer(64, 128, bits=8, symmetric=True, activation=ActivationSpec(8)))
    path = IntegerWeights.of(layer)
    with pytest.raises(ValueError, match="no layer of"):
        path(torch.randn(1, 128))
    with pytest.raises(Unsupported, match="16 bits"):
        cpu_path(layer)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("quad % 2 ? INT(srli_epi16)(both, 4) : both", "quad % 2 ? both : INT(srli_epi16)(both, 4)"),
        ("INT(sub_epi32)(BITS_OF(loadu)((const Ints *)(sums + t * OUTPUTS + v)), off)", "off"),
        ("    free(room);\n    return 0;", "    __builtin_trap();"),
    ],
)
def test_what_is_wrong_is_not_used(line: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by a product in a process of its own, which may end by it."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    copies = []
    for source in native._SOURCES:
        copies.append(tmp_path / source.name)
        text = source.read_text()
        assert source.name != "wna8.c" or text.count(line) == 1
        copies[-1].write_text(text.replace(line, wrong))
    monkeypatch.setattr(native, "_SOURCES", copies)
    forget()
    assert "fails" in (native.unavailable() or "")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("avx2 fma f16c", ["AVX2"]),
        ("avx2 fma f16c avx512f avx512bw avx512vl", ["AVX2"]),  # before VNNI
        ("avx2 fma f16c avx512f avx512bw avx512_vnni avx512vl", ["VNNI", "AVX2"]),
        ("avx2 fma f16c avx512f avx512bw avx512_vnni amx_bf16 amx_tile amx_int8", ["tiles", "VNNI", "AVX2"]),
    ],
)
def test_what_a_processor_has_is_compiled_for(flags: str, levels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system lists it."""
    monkeypatch.setattr(provenance, "_text", lambda path: f"model name : one\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(native, "cpu", provenance.cpu)
    vnni, tiles = {"-mavx512f", "-mavx512bw", "-mavx512vnni"}, {"-mamx-tile", "-mamx-int8"}
    words = {"AVX2": set(), "VNNI": vnni, "tiles": vnni | tiles}
    assert [set(options) for options in native.levels()] == [words[level] for level in levels]


@pytest.mark.usefixtures("forgotten")
def test_instructions_that_are_refused_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "levels", lambda: [("-mno-such-instructions",), ()])
    forget()
    assert native.instructions() == "AVX2"


def test_the_kernel_for_tiles_compiles_and_has_them(tmp_path: Path) -> None:
    """On any processor; what it computes is tested with tiles in plain C."""
    words = [*native._FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-S"]
    source, target = Path(native.__file__).with_name("wna8.c"), tmp_path / "wna8.s"
    done = subprocess.run(
        [os.environ.get("CC", "cc"), *words, str(source), "-o", str(target)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this compiler knows no tiles: {done.stderr.splitlines()[0]}")
    text = target.read_text()
    assert text.count("tdpbsud") >= 4 and "ldtilecfg" in text and "tilerelease" in text


def test_the_trial_needs_nothing_but_python() -> None:
    native.library()
    (target,) = {Path(native.library()._name)}
    trial = Path(native.__file__).with_name("trial.py")
    assert subprocess.run([sys.executable, "-I", "-S", str(trial), str(target)]).returncode == 0
