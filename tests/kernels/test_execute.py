"""Whole models through their kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.driver import quantize_model
from harness.errors import Unsupported
from harness.kernels.difference import Executions, measure_difference
from harness.kernels.execute import kernel_modules, packed_layers, put_in_place
from harness.methods.rtn import RTN
from harness.progress import silent
from harness.settings import Setting


def executions(model, setting: str, tmp_path: Path) -> Executions:
    quantized = quantize_model(
        model, RTN(), Setting.parse(setting), None, seed=0, checkpoints=tmp_path, progress=silent
    )
    quantized.install(model.module, model.architecture)
    kernels = kernel_modules(packed_layers(quantized.linears), model.device)
    return Executions({name: model.module.get_submodule(name) for name in kernels}, kernels, {})


@pytest.mark.parametrize("setting", ["W4A16g32", "W4A8", "W2A16g32"])
def test_kernels_stay_close_to_the_simulation(setting: str, tiny_model, tmp_path: Path) -> None:
    both = executions(tiny_model, setting, tmp_path)
    ids = torch.randint(0, 512, (3, 64), generator=torch.Generator().manual_seed(0))
    result = measure_difference("pydoc_kernels", tiny_model.module, both, ids, {}, lambda done, of: None)
    values = {row.metric: row.value for row in result.measurements}
    assert 0 < values["mean_logit_difference"] < values["max_logit_difference"] < 0.5
    assert values["top1_flips"] < 0.1
    assert values["max_layer_error"] < (1e-5 if setting == "W4A8" else 1e-2)
    assert abs(values["perplexity_difference_percent"]) < 1
    expected = 100 * (values["perplexity_of_kernels"] / values["perplexity_of_simulation"] - 1)
    assert values["perplexity_difference_percent"] == pytest.approx(expected)
    assert all(tiny_model.module.get_submodule(name) is module for name, module in both.simulation.items())


def test_a_wrong_kernel_shows(tiny_model, tmp_path: Path) -> None:
    both = executions(tiny_model, "W4A8", tmp_path)
    name = next(iter(both.kernels))
    both.kernels[name].path.scaled_sums.zero_()  # zero points of the activations are no longer taken off
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    result = measure_difference("pydoc_kernels", tiny_model.module, both, ids, {}, lambda done, of: None)
    values = {row.metric: row.value for row in result.measurements}
    assert values["max_logit_difference"] > 0.5 and values["max_layer_error"] > 0.1


def test_no_kernel_is_said_before_anything_is_scored(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"model.layers.0.*3-bit"):
        executions(tiny_model, "W3A16", tmp_path)


def test_a_run_through_kernels(tiny_folder: Path, tmp_path: Path) -> None:
    """By the command line: the cells' scores come from kernels, and each says how far it is from its simulation."""
    words = [sys.executable, "-P", "-m", "harness"]
    out = tmp_path / "run"
    run = ["run", "--methods", "rtn", "--models", str(tiny_folder), "--settings", "W4A8,W3A16", "--execute", "kernels"]
    more = ["--tasks", "pydoc:windows=2:length=128", "--calibration", "pydoc:2x64", "--threads", "1", "--out", str(out)]
    subprocess.run([*words, *run, *more], check=False, capture_output=True)
    text = subprocess.run([*words, "results", str(out), "--format", "json"], check=True, capture_output=True, text=True)
    rows = {(row["setting"], row["task"], row["metric"]): row for row in json.loads(text.stdout)}
    (difference,) = {task for _, task, _ in rows if task.startswith("pydoc_kernels")}
    assert abs(rows["W4A8", difference, "perplexity_difference_percent"]["value"]) < 1
    assert rows["W3A16", difference, None]["status"] == "unsupported"
    assert ("W16A16", difference, "top1_flips") not in rows  # the baseline has no kernels
    assert len(list(out.glob("cells/*/packed.safetensors"))) == 1


def test_modules_are_put_under_their_names() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    new = torch.nn.Linear(2, 2)
    put_in_place(model, {"0.0": new})
    assert model[0][0] is new
