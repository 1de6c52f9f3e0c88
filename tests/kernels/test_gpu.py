"""The Triton kernels under Triton's interpreter: source semantics, on CPU tensors. No GPU is involved."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch
from checks import integer, rotation, weight_only
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import random_layer

from harness.errors import Unsupported
from harness.kernels.configs import TARGETS, Config, shipped
from harness.kernels.gpu import launch
from harness.kernels.gpu.path import GpuPath, Hardware
from harness.kernels.pack import pack
from harness.quantizer import ActivationSpec
from harness.transform import BlockRotation, InputTransform, Permutation, block_hadamard

SWEEP = settings(max_examples=20, deadline=None)
SPECS = [ActivationSpec(8), ActivationSpec(4), ActivationSpec(8, True), ActivationSpec(4, True, 0.9)]


def kinds(integers: bool):
    """Layers of ragged sizes, every grouping that the kernels take, extreme codes."""

    def sized(draw):
        bits = draw(st.sampled_from([2, 4, 8] if integers else [2, 4]))
        axis = "oc" if integers else draw(st.sampled_from(["oc", "oc", "ic"]))
        sizes = [None, 64, 128] if axis == "ic" or (integers and bits == 4) else [None, 32, 64, 128]
        group = draw(st.sampled_from([None, 128] if bits == 8 else sizes))
        out, inputs = draw(st.integers(1, 140)), draw(st.integers(1, 300))
        if group is not None:
            out, inputs = (group, inputs) if axis == "ic" else (out, group * draw(st.integers(1, 320 // group)))
        return {
            "out": out, "inputs": inputs, "bits": bits, "group": group, "axis": axis, "symmetric": draw(st.booleans()),
            "bias": draw(st.booleans()), "extreme": draw(st.booleans()), "seed": draw(st.integers(0, 9)),
        }  # fmt: skip

    return st.composite(sized)()


@SWEEP
@given(
    kinds(integers=False),
    st.integers(1, 37),
    st.sampled_from([Config(16, 64), Config(32, 64, 2), Config(64, 64)]),
    st.sampled_from([torch.float16, torch.float16, torch.bfloat16]),
)
def test_weight_only_product(kind, count: int, config: Config, dtype: torch.dtype) -> None:
    weight_only(launch, count, config, dtype, **kind)


@SWEEP
@given(kinds(integers=False), st.integers(1, 4), st.sampled_from([Config(4, 64), Config(4, 32, 3)]))
def test_product_of_few_rows(kind, count: int, config: Config) -> None:
    weight_only(launch, count, config, torch.float16, **kind)


@SWEEP
@given(
    kinds(integers=True),
    st.integers(1, 37),
    st.sampled_from([Config(16, 64), Config(32, 128), Config(64, 128)]),
    st.sampled_from(SPECS),
)
def test_integer_product_is_exact(kind, count: int, config: Config, spec: ActivationSpec) -> None:
    integer(launch, count, config, spec, **kind)


@SWEEP
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([16, 64]),
    st.sampled_from([*SPECS, None]),
    st.sampled_from([*shipped("rotate", "sm_80"), Config(4, 256)]),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
)
def test_rotation(
    count: int, blocks: int, size: int, spec, config: Config, fused: bool, steps: int, smooth: bool
) -> None:
    rotation(launch, count, blocks, size, spec, config, fused=fused, steps=steps, smooth=smooth)


@pytest.mark.parametrize("group", [None, 128])
def test_rows_of_several_chunks_are_quantized(group: int | None) -> None:
    integer(launch, 3, Config(16, 64), ActivationSpec(8, clip=0.9), out=5, inputs=2 * 2048 + 128, group=group)


def test_what_no_kernel_does_is_refused() -> None:
    x, config, spec = torch.randn(2, 128), Config(16, 64), ActivationSpec(8)
    with pytest.raises(Unsupported, match="8 bits"):
        launch.weight_only(x.half(), pack(random_layer(8, 128, bits=8)), config)
    with pytest.raises(Unsupported, match="float32"):
        launch.weight_only(x, pack(random_layer(8, 128)), config)
    by_input = pack(random_layer(8, 128, axis="ic", activation=spec))
    with pytest.raises(Unsupported, match="16-bit words"):
        launch.integer(launch.quantize_rows(x, spec, by_input), by_input, config, torch.float32)
    narrow = pack(random_layer(8, 128, group=32, activation=spec))
    with pytest.raises(Unsupported, match="in bytes"):
        launch.weight_only(x.half(), narrow, config)
    with pytest.raises(Unsupported, match="groups of 32"):
        launch.integer(launch.quantize_rows(x, spec, narrow), narrow, config, torch.float32)
    backwards = InputTransform(steps=(Permutation(torch.arange(128)), BlockRotation(block_hadamard(64))))
    with pytest.raises(Unsupported, match="Permutation, BlockRotation"):
        launch.Rotations.of(backwards, torch.float16)


@pytest.fixture(scope="module")
def gpu_verify():
    """The script for whoever has a GPU."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu_verify.py"
    spec = importlib.util.spec_from_file_location("gpu_verify", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [1, 3, 17, 500])
def test_tuning_begins_with_what_is_shipped(gpu_verify, tokens: int) -> None:
    path = GpuPath(pack(random_layer(64, 128)), Hardware("sm_80", 4))
    kernel, shipped = path.config(tokens)
    found = list(gpu_verify.candidates(kernel, shipped, tokens))
    assert found[0] == shipped and len(set(found)) == len(found) > 1
    if tokens <= 4:  # in one block
        assert all(tokens <= config.block_m <= 4 for config in found)


def test_tuning_takes_the_fastest_that_answers_right(gpu_verify, capsys) -> None:
    """Of four: the shipped one, a faster one, a wrong one that is faster still, and one that does not launch."""
    shipped, better, wrong, broken = (Config(16, n) for n in (32, 64, 128, 256))
    seconds = {shipped: 3.0, better: 2.0, wrong: 1.0}
    timed = []

    def works(config: Config):
        timed.append(config)
        if config == broken:
            raise RuntimeError("out of shared memory")
        return lambda: torch.ones(8) * (2 if config == wrong else 1)

    def timer(work, *, flush: bool) -> float:
        return seconds[timed[-1]]

    tried = [shipped, better, wrong, broken]
    assert gpu_verify.fastest(works, tried, timer, time.monotonic() + 60) == better
    assert "off by 1" in (said := capsys.readouterr().err) and "RuntimeError" in said
    assert gpu_verify.fastest(works, tried, timer, time.monotonic() - 1) is None
    with pytest.raises(RuntimeError):
        gpu_verify.fastest(works, [broken, shipped], timer, time.monotonic() + 60)


def test_what_checks_a_gpu_finds_no_fault_here(gpu_verify) -> None:
    assert list(gpu_verify.wrong("cpu", [(70, 192)], [torch.float16], rows=[3, 17], tokens=5)) == []


def test_what_checks_a_gpu_finds_faults(gpu_verify, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(kernel):
        def run(*args, **kind):
            y = kernel(*args, **kind)
            return y.index_add(1, torch.tensor([3]), torch.full((len(y), 1), 0.5, dtype=y.dtype))

        return run

    for name in ("weight_only", "integer", "rotate"):
        monkeypatch.setattr(launch, name, off(getattr(launch, name)))
    faults = gpu_verify.wrong("cpu", [(70, 192)], [torch.float16], rows=[3], tokens=5)
    words = {fault.split()[0] for fault in faults}
    assert words == {"weight-only", "integer", "rotation", "model"}


def test_without_a_gpu_nothing_is_verified(gpu_verify, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_verify.py"])
    assert gpu_verify.main() == 1
    assert capsys.readouterr().out == "GPU: not measured (no CUDA device)\n"


def test_rows_that_do_not_lie_side_by_side_are_computed_all_the_same() -> None:
    layer = pack(random_layer(64, 128, group=64))
    x = torch.randn(128, 3).half().T
    for config in (Config(16, 64), Config(4, 64)):
        assert torch.equal(launch.weight_only(x, layer, config), launch.weight_only(x.contiguous(), layer, config))
    whole = pack(random_layer(64, 128, activation=ActivationSpec(8)))
    one, other = (launch.quantize_rows(each, ActivationSpec(8), whole) for each in (x, x.contiguous()))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.row_sums, other.row_sums)


def test_what_a_kernel_would_compute_wrongly_is_refused() -> None:
    along_outputs = pack(random_layer(192, 128, group=64, axis="ic"))
    with pytest.raises(ValueError, match="run across groups of 64"):
        launch.weight_only(torch.randn(17, 128).half(), along_outputs, Config(64, 128))
    for rows in (1, 16, 17, 256, 4096):
        for target in TARGETS:
            path = GpuPath(along_outputs, Hardware(target, 132))
            assert 64 % path.config(rows)[1].block_n == 0
    with pytest.raises(ValueError, match="5 rows in blocks of 4"):
        launch.weight_only(torch.randn(5, 128).half(), along_outputs, Config(4, 64))
    large = torch.empty(2**25, 128, dtype=torch.float16, device="meta")
    with pytest.raises(Unsupported, match="more than the kernels can count"):
        launch.weight_only(large, along_outputs, Config(64, 64))
    odd = pack(random_layer(64, 768, group=384, activation=ActivationSpec(8)))
    with pytest.raises(Unsupported, match="groups of 384"):
        launch.quantize_rows(torch.randn(2, 768), ActivationSpec(8), odd)
