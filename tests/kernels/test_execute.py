"""Whole models through their kernels."""

import dataclasses
from pathlib import Path

import pytest
import torch
from layers import random_layer

from harness.cells import Cell
from harness.driver import quantize_model
from harness.errors import Problems, Unsupported
from harness.events import Events
from harness.kernels import native
from harness.kernels.cpu import CpuKernels
from harness.kernels.difference import Executions, measure_difference
from harness.kernels.execute import kernel_modules, packed_layers, put_in_place
from harness.kernels.gpu.path import GpuKernels, Hardware
from harness.kernels.pack import pack
from harness.kernels.packfile import load_packed
from harness.methods.rtn import RTN
from harness.placement import IN_MEMORY
from harness.plan import ModelFacts, complete, draft
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec
from harness.registry import describe_methods
from harness.request import Request
from harness.runfolder import RunFolder
from harness.settings import Setting
from harness.tasks.measurement import read_result
from harness.transform import BlockRotation, InputTransform, block_hadamard
from harness.worker import Job, Timings, how_it_ended


def executions(model, setting: str, tmp_path: Path) -> Executions:
    quantized = quantize_model(
        model, RTN(), Setting.parse(setting), None, seed=0, checkpoints=tmp_path, progress=silent
    )
    quantized.install(model.module, model.architecture)
    kernels = kernel_modules(packed_layers(quantized.linears), model.architecture.shared_inputs, model.device)
    return Executions({name: model.module.get_submodule(name) for name in kernels}, kernels, {})


@pytest.mark.parametrize("setting", ["W4A16g32", "W4A8", "W2A16g32"])
def test_kernels_stay_close_to_the_simulation(setting: str, tiny_model, tmp_path: Path) -> None:
    both = executions(tiny_model, setting, tmp_path)
    ids = torch.randint(0, 512, (3, 64), generator=torch.Generator().manual_seed(0))
    result = measure_difference("pydoc_kernels", tiny_model.module, both, ids, {}, lambda done, of: None)
    values = {row.metric: row.value for row in result.measurements}
    if setting == "W4A8" and native.unavailable() is None:  # integers on both sides: the same bits
        assert not any(value for metric, value in values.items() if "perplexity_of" not in metric)
    else:
        assert 0 < values["mean_logit_difference"] < values["max_logit_difference"] < 0.5
        assert values["max_layer_error"] < 1e-2
    assert values["top1_flips"] < 0.1
    assert abs(values["perplexity_difference_percent"]) < 1
    expected = 100 * (values["perplexity_of_kernels"] / values["perplexity_of_simulation"] - 1)
    assert values["perplexity_difference_percent"] == pytest.approx(expected)
    assert all(tiny_model.module.get_submodule(name) is module for name, module in both.simulation.items())


@pytest.mark.parametrize("kernels", [CpuKernels(), GpuKernels(Hardware("sm_80", 4))], ids=["of a CPU", "of a GPU"])
def test_an_input_is_shared_by_layers_of_one_kind_only(kernels) -> None:
    """Behind one transform: integers, clipped in two ways, weights along the inputs, and activations as they are."""
    transform = InputTransform(torch.rand(128) + 0.5, (BlockRotation(block_hadamard(64)),))
    kinds = {
        "a": {"activation": ActivationSpec(8)}, "b": {"activation": ActivationSpec(8), "seed": 1},
        "c": {"activation": ActivationSpec(8, clip=0.5)}, "d": {"activation": ActivationSpec(8), "axis": "ic"},
        "e": {"group": 64}, "f": {"axis": "ic"},
    }  # fmt: skip
    layers = {name: pack(random_layer(64, 128, transform=transform, **kind)) for name, kind in kinds.items()}
    cpu = torch.device("cpu")
    alone = {name: kernel_modules({name: layer}, [(name,)], cpu, kernels)[name] for name, layer in layers.items()}
    for order in (list(layers), list(reversed(layers))):
        together = kernel_modules(layers, [tuple(order)], cpu, kernels)
        assert together["a"].prepare is together["b"].prepare is not together["c"].prepare
        x = torch.randn(2, 3, 128)
        assert all(torch.equal(together[name](x), alone[name](x)) for name in order)


@pytest.mark.usefixtures("runs")
def test_a_wrong_kernel_shows(tiny_model, tmp_path: Path) -> None:
    both = executions(tiny_model, "W4A8", tmp_path)
    name = next(iter(both.kernels))
    both.kernels[name].path.buffer[64:256] ^= 255  # the first codes, behind the header
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    result = measure_difference("pydoc_kernels", tiny_model.module, both, ids, {}, lambda done, of: None)
    values = {row.metric: row.value for row in result.measurements}
    assert values["max_logit_difference"] > 0.5 and values["max_layer_error"] > 0.1


def test_no_kernel_is_said_before_anything_is_scored(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"model.layers.0.*3-bit"):
        executions(tiny_model, "W3A16", tmp_path)


@pytest.fixture
def settings_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker makes its process deterministic; this process is not the worker's own."""
    monkeypatch.setattr("harness.worker.make_deterministic", lambda threads, seed: None)


def kernel_job(folder: Path, setting: str, out: Path) -> Job:
    """A worker's job that scores a cell through its kernels."""
    cell = Cell(
        model="tiny", model_path=str(folder), weights_sha256="", method="rtn", method_source="rtn",
        method_sha256=describe_methods()["rtn"].sha256, options={}, setting=setting, dtype="float32", device="cpu",
        seed=0, calibration="pydoc:2x64", calibration_sha256=None,
        tasks=("pydoc:length=128:windows=2", "pydoc_kernels:length=128:windows=2"), data_root=None, execute="kernels",
    )  # fmt: skip
    cell_folder = RunFolder(out).cell(cell.id)
    cell_folder.path.mkdir(parents=True)
    return Job(cell, cell_folder, 1, IN_MEMORY, Events.from_environment(), Timings())


@pytest.mark.usefixtures("settings_of_torch", "runs")
@pytest.mark.parametrize(
    ("kernels", "setting", "operator"),
    [("of the CPU", "W4A8", "wna8_integer"), ("of a GPU", "W4A16g32", "wna16_narrow 64×64; given bfloat16")],
)
def test_a_cell_is_scored_through_its_kernels(
    kernels: str, setting: str, operator: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a GPU under Triton's interpreter: a model in float32, multiplied in bfloat16."""
    if kernels == "of a GPU":
        monkeypatch.setattr("harness.kernels.execute.kernels_of", lambda device: GpuKernels(Hardware("sm_80", 4)))
    job = kernel_job(tiny_folder, setting, tmp_path)
    job.run()
    results = [read_result(job.folder.tasks, task) for task in job.cell.tasks]
    scored, compared = ({row.metric: row.value for row in result.measurements} for result in results)
    assert any(operator in label for label in results[1].manifest["operators"])
    assert scored["token_perplexity"] == pytest.approx(compared["perplexity_of_kernels"], rel=1e-6)
    same = compared["perplexity_of_kernels"] == compared["perplexity_of_simulation"]
    assert same == (setting == "W4A8")  # integers are multiplied on both sides, or half precision on one
    assert set(load_packed(job.folder.packed)) == set(QuantizedModel.load(job.folder.quantized).linears)


@pytest.mark.usefixtures("settings_of_torch")
def test_a_cell_without_kernels_is_unsupported_and_not_scored(tiny_folder: Path, tmp_path: Path) -> None:
    job = kernel_job(tiny_folder, "W3A16", tmp_path)
    assert how_it_ended(job.run)[0] == "unsupported"
    assert not list(job.folder.tasks.glob("*.json"))


def test_what_runs_through_kernels_is_compared(tiny_folder: Path) -> None:
    """By the plan: with the simulation, on the corpus that is scored; but for the baseline, which has no kernels."""
    asked = Request(
        methods=("rtn",), models=(str(tiny_folder),), settings=("W4A8",), tasks=("pydoc:windows=2",), execute="kernels"
    )
    plan = draft(asked)
    assert [task.key for task in plan.tasks][1].startswith("pydoc_kernels")
    baseline, quantized = complete(plan, {plan.models[0].name: ModelFacts(tiny_folder, "", None)})
    assert len(baseline.tasks) == 1 and len(quantized.tasks) == 2
    assert quantized.execute == "kernels"
    with pytest.raises(Problems, match="--execute 'nothing'"):
        draft(dataclasses.replace(asked, execute="nothing"))


def test_modules_are_put_under_their_names() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    new = torch.nn.Linear(2, 2)
    put_in_place(model, {"0.0": new})
    assert model[0][0] is new
