"""Small random models of five architectures, and calibration text for them, made in a moment and always the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from harness.models import LoadedModel

REAL = "smollm2-135m"
_VOCABULARY = 97
_SEQUENCES, _LONGEST = 6, 512
_COMMON: dict[str, Any] = {"vocab_size": _VOCABULARY, "max_position_embeddings": _LONGEST, "initializer_range": 0.1}
_COMMON |= {"bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
_GATED = _COMMON | {"intermediate_size": 96}


def _configurations() -> Mapping[str, PreTrainedConfig]:
    return {
        "llama, grouped-query, tied": LlamaConfig(**_GATED, num_key_value_heads=2, tie_word_embeddings=True),
        "qwen2, biased": Qwen2Config(**_GATED, num_key_value_heads=2),
        "opt, layer norms": OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=64),
        "gemma2, odd sizes": Gemma2Config(
            **_GATED | {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3},
            num_key_value_heads=1, head_dim=16, sliding_window=8,
        ),
        "gpt-neox, fused and parallel": GPTNeoXConfig(**_GATED),
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model to try a method on. ``build`` makes it anew, with the same weights each time."""

    name: str
    build: Callable[[], LoadedModel]
    calibration: Callable[[int], Int64[torch.Tensor, "n length"]]
    """Six sequences of that length."""
    short: int = 64
    long: int = 512
    """Six such sequences are more tokens than one chunk of a stream holds, and not a multiple."""


def tiny_cases() -> dict[str, Case]:
    """By name; the first is the one that checks which need only one model run on."""
    return {name: Case(name, partial(_tiny, name), _random_ids) for name in _configurations()}


def real_case(path: Path) -> Case:
    """The checkpoint of ``smollm2-135m`` at ``path``, with its own text."""
    from harness.calibration import CalibrationSpec, calibration_ids
    from harness.models import load_model

    def build() -> LoadedModel:
        return load_model(path, name=REAL, dtype="float32", device="cpu")

    def ids(length: int) -> torch.Tensor:
        spec = CalibrationSpec.parse(f"pydoc:{_SEQUENCES}x{length}")
        return torch.from_numpy(calibration_ids(spec, build().tokenizer, None, seed=0))

    return Case(REAL, build, ids, short=_LONGEST)


def _tiny(name: str) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(_configurations()[name]).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.ndim == 1:  # fresh norms are all ones and biases all zeros, which hides mistakes
                parameter.data += 0.1 * torch.randn(parameter.shape)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>")))
    return LoadedModel(module, tokenizer, name, Path(name))


def _random_ids(length: int) -> Int64[torch.Tensor, "n length"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, _VOCABULARY, (_SEQUENCES, length), generator=generator)
