"""The harness' own format: the cell's artifact beside everything else that the model needs. Carries every cell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.cells import EXECUTIONS, Execution
from harness.errors import HarnessError
from harness.export.checkpoint import Finished, write_folder
from harness.kernels.execute import kernel_modules, packed_layers, put_in_place
from harness.models import LoadedModel
from harness.quantized import QuantizedModel
from harness.quantizedfile import FORMAT_VERSION

_METHOD = "harness"
_ARTIFACT = "quantized.safetensors"


def write(finished: Finished, to: Path) -> None:
    """The full-precision rest as ``model.safetensors``, the integers as ``quantized.safetensors``."""
    partial = to.with_name(f".{to.name}.native")
    shutil.rmtree(partial, ignore_errors=True)
    about = {"quant_method": _METHOD, "format": FORMAT_VERSION, "cell": finished.cell.to_json()}
    write_folder(finished, partial, finished.rest(), about)
    finished.quantized.save(partial / _ARTIFACT)
    partial.rename(to)


def load(path: Path, device: str = "cpu", execute: Execution = "simulation") -> LoadedModel:
    """A model that :func:`write` wrote, on the values that its integers stand for, or through their kernels.

    Raises HarnessError for a folder that is not one, Unsupported where a layer has no kernel on ``device``.
    """
    if execute not in EXECUTIONS:
        raise HarnessError(f"cannot execute by {execute!r}", fix=f"execute: {', '.join(EXECUTIONS)}")
    config_file = path / "config.json"
    about = json.loads(config_file.read_text()) if config_file.is_file() else {}
    quantization = about.pop("quantization_config", {})
    if quantization.get("quant_method") != _METHOD or not (path / _ARTIFACT).is_file():
        raise HarnessError("not an exported model", where=str(path), fix="harness export CELL --format native --to …")
    config = AutoConfig.for_model(**about)
    with torch.random.fork_rng(devices=[]):
        module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, about["dtype"]))
    quantized = QuantizedModel.load(path / _ARTIFACT)
    missing, unexpected = module.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    module.tie_weights()
    integers = {f"{name}.{part}" for name in quantized.linears for part in ("weight", "bias")}
    tied = set(module.all_tied_weights_keys)
    if lacking := [*unexpected, *(set(missing) - integers - tied)]:
        raise HarnessError(f"the exported model lacks or has too much: {', '.join(lacking[:3])}", where=str(path))
    nn.Module.to(module, device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = LoadedModel(module, tokenizer, quantization["cell"]["model"], path)
    quantized.install(module, model.architecture)
    if execute == "kernels":
        packed, shared = packed_layers(quantized.linears), model.architecture.shared_inputs
        put_in_place(module, kernel_modules(packed, shared, torch.device(device)))
    return model
