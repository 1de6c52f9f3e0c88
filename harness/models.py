"""Load a checkpoint folder through transformers: safetensors only, no code of its own, in the asked precision."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from harness.architecture import Architecture, discover
from harness.checkpoint import open_checkpoint
from harness.errors import HarnessError
from harness.pagedmodel import Unreadable, load_paged
from harness.paging import InMemory, Paged, Weights
from harness.placement import IN_MEMORY, Placement


@dataclass
class LoadedModel:
    """A causal language model in evaluation mode, without gradients, and its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path
    paged: Paged | None = None

    @property
    def weights(self) -> Weights:
        """Where the weights of the decoder blocks are."""
        return self.paged or InMemory(self.module)

    @cached_property
    def architecture(self) -> Architecture:
        return discover(self.module)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.device
        return device


def load_model(
    path: Path, *, name: str, dtype: str = "default", device: str = "cpu", placement: Placement = IN_MEMORY
) -> LoadedModel:
    """The model at ``path``. ``dtype`` is ``float32``, ``bfloat16``, ``float16``, ``checkpoint`` or ``default``.

    ``default`` is float32 on a CPU and the checkpoint's own elsewhere. With ``placement.paged`` decoder blocks are read
    when they are needed and dropped afterwards; a checkpoint for which that is not possible is loaded whole, with a
    warning. Raises HarnessError when the folder is not a sound checkpoint or transformers does not know its
    architecture.
    """
    checkpoint = open_checkpoint(path)
    transformers_logging.disable_progress_bar()
    if dtype == "default":
        dtype = "float32" if device == "cpu" else "checkpoint"
    wanted = "auto" if dtype == "checkpoint" else getattr(torch, dtype)
    paged = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if placement.paged:
            with _whole_if_unreadable(name):
                module, paged = load_paged(checkpoint, wanted, device)
        if paged is None:
            module = AutoModelForCausalLM.from_pretrained(
                path, dtype=wanted, trust_remote_code=False, use_safetensors=True, local_files_only=True
            )
            nn.Module.to(module, device)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise HarnessError(
            f"transformers cannot load {name!r}: {why}",
            where=str(path),
            fix="use a checkpoint of a causal language model that this version of transformers knows",
        ) from error
    module.eval().requires_grad_(False)
    # Models made for chat warn on every long text; the harness cuts windows itself.
    tokenizer.model_max_length = int(1e30)
    return LoadedModel(module, tokenizer, name, path, paged)


@contextmanager
def _whole_if_unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as reason:
        warnings.warn(f"{name} is loaded whole, not block by block: {reason}", stacklevel=4)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides how it cuts text: its backend as JSON, or its vocabulary where there is no backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about: dict[str, object] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    about |= {"truncation": None, "padding": None}  # of the last call, not of the tokenizer
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
