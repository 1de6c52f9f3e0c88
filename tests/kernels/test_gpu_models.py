"""Whole models through the Triton kernels, under the interpreter: the modules and launches that a GPU is given."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from layers import random_layer
from pretended_gpu import DEVICE, Elsewhere, pretended_gpu

from harness.driver import quantize_model
from harness.errors import BadOutput, Unsupported
from harness.kernels import watching
from harness.kernels.cpu import CpuKernels
from harness.kernels.difference import Executions, measure_difference
from harness.kernels.execute import kernel_modules, kernels_of, packed_layers, put_in_place
from harness.kernels.gpu import launch
from harness.kernels.gpu.path import GpuKernels, GpuPath, Hardware
from harness.kernels.pack import on_device, pack, unpack
from harness.kernels.precision import check_precision
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec
from harness.registry import create_method, describe_methods
from harness.settings import Setting
from harness.specs import Spec, bind
from harness.transform import BlockRotation, InputTransform, Permutation, block_hadamard

CPU = torch.device("cpu")
A100 = GpuKernels(Hardware("sm_80", 4))
HALF, SINGLE = torch.float16, torch.float32
IDS = torch.randint(2, 512, (1, 6), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(1))
DUQUANT = "duquant:max_rotation_step=4:weights=rtn"


def quantized_by(method: str, setting: str, model: LoadedModel, tmp_path: Path) -> QuantizedModel:
    spec = Spec.parse(method)
    made = create_method(spec.name, bind(describe_methods()[spec.name].options, spec))
    return quantize_model(
        model, made, Setting.parse(setting), CALIBRATION, seed=0, checkpoints=tmp_path, progress=silent
    )


def executions(
    model: LoadedModel, quantized: QuantizedModel, dtype: torch.dtype, device: torch.device = CPU
) -> Executions:
    """Both, of the model in ``dtype`` on ``device``."""
    model.module.to(device, dtype)
    quantized.install(model.module, model.architecture)
    kernels = kernel_modules(packed_layers(quantized.linears), model.architecture.shared_inputs, device, A100)
    simulation = {name: model.module.get_submodule(name) for name in kernels}
    return Executions(simulation, kernels, {})


# Layers in half precision are a rounding of the result away from their simulation, float32's by way of bfloat16 two
# truncations of the interpreter's. Logits: more, where that decides over a level of an activation.
CASES = {
    "groups": ("rtn", "W4A16g32", HALF, 1e-3, 0.1),
    "two bits": ("rtn", "W2A16g32", HALF, 1e-3, 0.1),
    "groups, by bfloat16": ("rtn", "W4A16g32", SINGLE, 2e-2, 0.5),
    "integers of eight bits": ("rtn", "W4A8", HALF, 1e-3, 0.5),
    "integers of four bits, exactly": ("rtn", "W4A4", SINGLE, 1e-6, 1e-4),
    "transformed": (DUQUANT, "W4A8", HALF, 1e-3, 0.5),
    "transformed, by bfloat16": (DUQUANT, "W4A8", SINGLE, 3e-2, 1.5),
    "scales along inputs": ("adadim:axes=ic", "W4A8", HALF, 1e-3, 0.5),
    "scales along inputs, by bfloat16": ("adadim:axes=ic", "W4A8", SINGLE, 2e-2, 1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_stays_close_to_its_simulation(case: str, tiny_model: LoadedModel, tmp_path: Path) -> None:
    method, setting, dtype, layer_error, logits = CASES[case]
    both = executions(tiny_model, quantized_by(method, setting, tiny_model, tmp_path), dtype)
    started: Counter[str] = Counter()
    with watching.watched_by(lambda kernel, _: started.update([kernel])):
        result = measure_difference("pydoc_kernels", tiny_model.module, both, IDS, {}, lambda done, of: None)
    assert started["wna16"] + started["wna8"] == 2 * len(both.kernels)  # by itself, and in its place
    values = {row.metric: row.value for row in result.measurements}
    assert values["max_layer_error"] < layer_error
    assert values["max_logit_difference"] < logits


LABELS = {
    ("rtn", "W4A16g32"): ("wna16_gemv 1×16; given bfloat16", "wna16_narrow 16×64; given bfloat16"),
    ("rtn", "W4A8"): ("act_quant + wna8 16×64; given int8",),
    ("adadim:axes=ic", "W4A8"): (
        "wna16_gemv 1×16, activations simulated; given bfloat16", "wna16 16×64, activations simulated; given bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_what_runs_is_what_is_declared(case: tuple[str, str], tiny_model: LoadedModel, tmp_path: Path) -> None:
    modules = executions(tiny_model, quantized_by(*case, tiny_model, tmp_path), SINGLE).kernels
    assert check_precision(modules, [1, 5], SINGLE) == dict.fromkeys(LABELS[case], 28 // len(LABELS[case]))


def test_an_input_is_prepared_once_for_all_that_share_it(tiny_model: LoadedModel, tmp_path: Path) -> None:
    kernels = executions(tiny_model, quantized_by(DUQUANT, "W4A4", tiny_model, tmp_path), HALF).kernels
    put_in_place(tiny_model.module, kernels)
    started: Counter[str] = Counter()
    with watching.watched_by(lambda kernel, _: started.update([kernel])):
        tiny_model.module(IDS[:, :2], use_cache=False)
    # In each of two blocks seven linears, of which three share an input, and two another.
    assert started == {"rotate_quantize": 8, "wna8": 14}


def test_nothing_is_left_on_the_cpu(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, transforms, windows: a GPU would refuse to read them there. The interpreter is shown its own tensors."""

    def shown(kernel, grid, *operands, **constants) -> None:
        assert all(isinstance(each, Elsewhere) for each in operands if isinstance(each, torch.Tensor))
        watching.start(kernel, grid, *(getattr(each, "here", each) for each in operands), **constants)

    monkeypatch.setattr(launch, "start", shown)
    quantized = quantized_by(DUQUANT, "W4A4", tiny_model, tmp_path)
    with pretended_gpu():
        both = executions(tiny_model, quantized, HALF, DEVICE)
        measured = measure_difference.__wrapped__  # not in inference mode, where wrapped tensors do not pass
        result = measured("pydoc_kernels", tiny_model.module, both, IDS, {}, lambda done, of: None)
        check_precision(both.kernels, [1], HALF)
    assert next(row.value for row in result.measurements if row.metric == "max_layer_error") < 1e-3


# --- what is watched --------------------------------------------------------------------------------------------------


def weight_only_module(monkeypatch: pytest.MonkeyPatch, planted=None):
    if planted is not None:
        monkeypatch.setattr(GpuPath, "__call__", planted)
    return kernel_modules({"a": pack(random_layer(64, 128, group=64))}, [("a",)], CPU, A100)


def test_a_product_by_other_means_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights dequantized, and multiplied by torch."""
    modules = weight_only_module(monkeypatch, lambda path, x: x @ unpack(path.layer).weight().to(x.dtype).T)
    with pytest.raises(BadOutput, match="a declares wna16_gemv on float16, and ran aten::mm on float16"):
        check_precision(modules, [1], HALF)


def test_another_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = GpuPath.__call__
    modules = weight_only_module(monkeypatch, lambda path, x: run(path, x.repeat(17, 1))[: len(x)])
    with pytest.raises(BadOutput, match="a declares wna16_gemv on float16, and ran wna16 on float16"):
        check_precision(modules, [1], HALF)


def test_another_type_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = GpuPath.__call__
    modules = weight_only_module(monkeypatch, lambda path, x: run(path, x.bfloat16()).to(x.dtype))
    with pytest.raises(BadOutput, match="a declares wna16_gemv on float16, and ran wna16_gemv on bfloat16"):
        check_precision(modules, [1], HALF)


def test_a_kernel_that_nobody_is_told_of_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = weight_only_module(monkeypatch)
    monkeypatch.setattr(launch, "start", lambda kernel, grid, *rest, **constants: kernel[grid](*rest, **constants))
    with pytest.raises(BadOutput, match="ran no product that can be watched"):
        check_precision(modules, [1], HALF)


def test_products_are_counted_not_only_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a sum along the inputs are one launch and no product of their own; two launches are two."""
    run = GpuPath.__call__
    layer = pack(random_layer(16, 1024, group=64))
    (module,) = (modules := kernel_modules({"a": layer}, [("a",)], CPU, A100)).values()
    assert "inputs in" in module.path.operator(1)
    check_precision(modules, [1], HALF)
    monkeypatch.setattr(GpuPath, "__call__", lambda path, x: (run(path, x) + run(path, x)) / 2)
    with pytest.raises(BadOutput, match="ran wna16_gemv on float16 and wna16_gemv on float16"):
        check_precision(modules, [1], HALF)


# --- what is refused --------------------------------------------------------------------------------------------------

ROTATION = BlockRotation(block_hadamard(8))
A8 = {"activation": ActivationSpec(8)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"bits": 8}, "no weight-only kernel for 8 bits"),
        ({"bits": 8, "axis": "ic", **A8}, "no weight-only kernel for 8 bits"),
        ({"group": 32, **A8}, "4-bit integers in groups of 32.*groups of 64 or 128"),
        ({"bits": 8, "group": 64, **A8}, "8-bit integers in groups of 64.*groups of 128"),
        ({"transform": InputTransform(steps=(ROTATION,))}, "rotates blocks of 8 inputs"),
        ({"transform": InputTransform(steps=(Permutation(torch.arange(128)),))}, "input transform Permutation"),
    ],
)
def test_a_layer_without_a_kernel_is_named(kind, message: str) -> None:
    layers = {"model.a": pack(random_layer(64, 128)), "model.b": pack(random_layer(64, 128, **kind))}
    with pytest.raises(Unsupported, match=f"(?s)model.b: .*{message}"):
        kernel_modules(layers, [tuple(layers)], CPU, A100)


@pytest.mark.parametrize("target", ["sm_75", "gfx90a", "gfx1100"])
def test_a_gpu_that_no_kernel_is_compiled_for_is_named(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "of", lambda device: Hardware(target, 100))
    with pytest.raises(Unsupported, match=f"this GPU is {target}"):
        kernels_of(torch.device("cuda"))


@pytest.mark.parametrize("target", ["sm_80", "sm_121", "gfx942"])
def test_the_others_are_taken(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "of", lambda device: Hardware(target, 100))
    assert kernels_of(torch.device("cuda", 1)) == GpuKernels(Hardware(target, 100))


def test_what_runs_where_is_decided_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(kernels_of(CPU), CpuKernels)
    with pytest.raises(Unsupported, match="none for xpu"):
        kernels_of(torch.device("xpu"))
    for name in ("path", "launch"):  # as in a process that has not imported them yet
        monkeypatch.delitem(sys.modules, f"harness.kernels.gpu.{name}")
        monkeypatch.delattr(f"harness.kernels.gpu.{name}")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(Unsupported, match="Triton, which runs kernels on a GPU, is not installed"):
        kernels_of(torch.device("cuda"))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_transforms_are_shared_as_they_were() -> None:
    one, other = (InputTransform(steps=(BlockRotation(block_hadamard(16)),)) for _ in range(2))
    kinds = {"a": one, "b": one, "c": other, "d": None}
    layers = {name: pack(random_layer(64, 16, transform=transform)) for name, transform in kinds.items()}
    moved = on_device(layers, torch.device("meta"))
    assert moved["a"].transform is moved["b"].transform is not moved["c"].transform
    assert moved["d"].transform is None
    assert moved["c"].transform.steps[0].matrix.is_meta and moved["c"].qweight.is_meta


def test_smoothing_alone_is_a_division() -> None:
    x = torch.randn(3, 128)
    layer = pack(random_layer(64, 128, transform=InputTransform(torch.rand(128) + 0.5)))
    assert torch.equal(A100.preparing(A100.path(layer))(x), layer.transform.apply(x))


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, SINGLE])
def test_a_model_keeps_its_type(dtype: torch.dtype) -> None:
    transform = InputTransform(steps=(BlockRotation(block_hadamard(64)),))
    for activation in (None, ActivationSpec(4)):
        layer = pack(random_layer(64, 128, activation=activation, transform=transform))
        (module,) = kernel_modules({"a": layer}, [("a",)], CPU, A100).values()
        y = module(torch.randn(1, 2, 128).to(dtype))
        assert y.dtype == dtype and y.shape == (1, 2, 64)
