"""Load a model whose decoder blocks stay in its checkpoint until they are needed."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from harness.architecture import block_names
from harness.checkpoint import Checkpoint
from harness.paging import Paged


class Unreadable(Exception):
    """A checkpoint that cannot be read block by block."""


def load_paged(checkpoint: Checkpoint, dtype: torch.dtype | str, device: str) -> tuple[PreTrainedModel, Paged]:
    """The model of ``checkpoint``: everything in memory but its blocks, which are read as they are entered.

    Raises Unreadable where a weight lies in the checkpoint under another name than in the model.
    """
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (checkpoint.path / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    module.tie_weights()
    stored = _stored_names(module, checkpoint)
    blocks = block_names(module)
    read = partial(_read, checkpoint, stored, dict(module.named_parameters()), device)
    for name, _ in list(module.named_parameters()):
        if not name.startswith(tuple(f"{block}." for block in blocks)):
            _fill(module, name, read(name))
    module.tie_weights()
    for buffered in module.modules():
        for name, buffer in buffered._buffers.items():
            buffered._buffers[name] = None if buffer is None else buffer.to(device)
    return module, Paged(module, blocks, read)


def _stored_names(module: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Under which name each parameter lies in the checkpoint: its own, or with or without the model's prefix."""
    prefix = f"{module.base_model_prefix}."
    found, missing = {}, []
    for name, parameter in module.named_parameters():
        for stored in (name, name.removeprefix(prefix), prefix + name):
            info = checkpoint.tensors.get(stored)
            if info is not None and info.shape == tuple(parameter.shape):
                found[name] = stored
                break
        else:
            missing.append(name)
    if missing:
        raise Unreadable(f"{len(missing)} weights are not in the checkpoint under their own names, first {missing[0]}")
    return found


def _read(
    checkpoint: Checkpoint, stored: dict[str, str], like: dict[str, nn.Parameter], device: str, name: str
) -> torch.Tensor:
    """A parameter by its name. The file is opened for it alone: what was read of a mapped file counts as memory."""
    info = checkpoint.tensors[stored[name]]
    with safe_open(checkpoint.path / info.file, framework="pt") as file:
        value: torch.Tensor = file.get_tensor(stored[name])
        return value.to(device=device, dtype=like[name].dtype, copy=True)


def _fill(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
