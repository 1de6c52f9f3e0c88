"""Whole models through the Triton kernels, under the interpreter: the modules and launches that a GPU is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers import random_layer

from harness.driver import quantize_model
from harness.errors import BadOutput, Unsupported
from harness.kernels.difference import Executions, measure_difference
from harness.kernels.execute import KernelLinear, kernel_modules, kernels_of, packed_layers, put_in_place
from harness.kernels.gpu import launch, starting
from harness.kernels.gpu.path import GpuKernels, GpuPath, Hardware
from harness.kernels.pack import pack
from harness.kernels.precision import check_precision
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantizer import ActivationSpec
from harness.registry import create_method, describe_methods
from harness.settings import Setting
from harness.specs import Spec, bind

CPU = torch.device("cpu")
A100 = GpuKernels(Hardware("sm_80", 4))
IDS = torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(1))


def executions(model: LoadedModel, method: str, setting: str, dtype: torch.dtype, tmp_path: Path) -> Executions:
    """Both, of ``model`` in ``dtype``, each layer's product checked."""
    spec = Spec.parse(method)
    made = create_method(spec.name, bind(describe_methods()[spec.name].options, spec))
    quantized = quantize_model(
        model, made, Setting.parse(setting), CALIBRATION, seed=0, checkpoints=tmp_path, progress=silent
    )
    model.module.to(dtype)
    quantized.install(model.module, model.architecture)
    kernels = kernel_modules(packed_layers(quantized.linears), CPU, A100)
    simulation = {name: model.module.get_submodule(name) for name in kernels}
    return Executions(simulation, kernels, check_precision(kernels, [1, 64], dtype))


def measured(model: LoadedModel, both: Executions) -> dict[str, float]:
    result = measure_difference("pydoc_kernels", model.module, both, IDS, {}, lambda done, of: None)
    return {row.metric: row.value for row in result.measurements}


HALF, FLOAT = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("method", "setting", "dtype", "operator", "layer_error", "logits"),
    [
        ("rtn", "W4A16g32", HALF, "wna16_narrow 64×64; given float16", 2e-3, 0.1),
    ],
)  # fmt: skip
def test_a_model_stays_close_to_its_simulation(
    method: str, setting: str, dtype: torch.dtype, operator: str, layer_error: float, logits: float,
    tiny_model: LoadedModel, tmp_path: Path,
) -> None:  # fmt: skip
    both = executions(tiny_model, method, setting, dtype, tmp_path)
    assert operator in both.operators and sum(both.operators.values()) == 2 * len(both.kernels)
    values = measured(tiny_model, both)
    print(values, both.operators)
    assert values["max_layer_error"] < layer_error
    assert 0 < values["max_logit_difference"] < logits
