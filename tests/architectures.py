"""Small random models of many architectures."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from harness.models import LoadedModel

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[PreTrainedConfig, list[int]]] = {
    "llama, tied": (LlamaConfig(**LLAMA, tie_word_embeddings=True), [3, 1, 2, 1]),
    "mistral, sliding window": (MistralConfig(**LLAMA, sliding_window=8), [3, 1, 2, 1]),
    "qwen2, biased": (Qwen2Config(**LLAMA), [3, 1, 2, 1]),
    "qwen3, odd head": (Qwen3Config(**LLAMA, head_dim=24), [3, 1, 2, 1]),
    "gemma": (GemmaConfig(**LLAMA, head_dim=16), [3, 1, 2, 1]),
    "gemma2, two kinds of block": (Gemma2Config(**LLAMA, head_dim=16, sliding_window=8), [3, 1, 2, 1]),
    "gemma3": (Gemma3TextConfig(**LLAMA, head_dim=16, sliding_window=8), [3, 1, 2, 1]),
    "opt": (OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64), [3, 1, 1, 1]),
    "phi, parallel branches": (PhiConfig(**SIZES, intermediate_size=96), [4, 1, 1]),
    "gpt-neox": (GPTNeoXConfig(**SIZES, intermediate_size=96), [1, 1, 1, 1]),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name][0]).eval().requires_grad_(False)


def loaded(name: str) -> LoadedModel:
    """The same with all that belongs to a model but a tokenizer."""
    return LoadedModel(build(name), None, name, Path())


def ids(sequences: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(0))
