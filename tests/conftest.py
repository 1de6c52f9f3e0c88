"""What many tests share: a data root, a tiny model with its tokenizer, and a cache folder of the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
ENVIRONMENT = dict(os.environ)  # before the tests get a cache of their own
# Triton's kernels run on CPU tensors here. Its own library is decorated when it is imported, which any test may cause.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the user's own cache out of the tests, and the tests out of it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["HARNESS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A data root with real datasets; tests that need it skip where it is not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data root at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 512 tokens, trained on Python's own documentation."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from harness.corpora import pydoc_topics

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "</s>"]
    bpe.train_from_iterator(pydoc_topics("train").values(), vocab_size=512, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random Llama: 2 blocks, hidden size 64, grouped-query attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # logits that differ, as a trained model's do
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder: Path):
    """The tiny Llama, loaded anew for each test that may change it."""
    from harness.models import load_model

    return load_model(tiny_folder, name="tiny", dtype="float32", device="cpu")


@pytest.fixture
def four_blocks(tiny_model):
    """The tiny Llama with each of its blocks twice."""
    import copy

    import torch

    layers = tiny_model.module.model.layers
    tiny_model.module.model.layers = torch.nn.ModuleList([*layers, *copy.deepcopy(layers)])
    tiny_model.module.config.num_hidden_layers = 4
    return tiny_model


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M, from the user's own cache or fetched into it; where it cannot be had, only CI fails."""
    words = [sys.executable, "-P", "-m", "harness", "models", "fetch", "smollm2-135m"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"smollm2-135m cannot be fetched: {done.stderr}")
    return Path(done.stdout.strip())
