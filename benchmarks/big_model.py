"""A checkpoint of llama2-7b's shape with random weights, to see how much memory quantizing a large model takes.

    python -P benchmarks/big_model.py make /data/random-7b                # 13.5 GB in bfloat16
    harness run --models /data/random-7b --methods rtn,gptq --settings W4A16g128 --tasks pydoc:windows=1:length=256 \
        --calibration pydoc:8x256 --memory 6GB --out runs/random-7b
    python -P benchmarks/big_model.py depth /tmp/depth --figure docs/figures/memory_depth.svg

``depth`` quantizes narrower models of 4, 8, 16 and 32 blocks, each in a process of its own, and draws the most memory
that each held.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from harness import processes
from harness.corpora import pydoc_topics

LLAMA2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
NARROW = LLAMA2_7B | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
DEPTHS = (4, 8, 16, 32)
BLUE, GREY = "#0072B2", "#999999"


def make(folder: Path, shape: dict[str, int]) -> None:
    """Write the checkpoint, a file for each block."""
    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    texts = pydoc_topics("train").values()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>").save_pretrained(folder)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    block = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    files: dict[str, dict[str, tuple[int, ...]]] = {
        "outside.safetensors": {
            "model.embed_tokens.weight": (shape["vocab_size"], hidden),
            "lm_head.weight": (shape["vocab_size"], hidden),
            "model.norm.weight": (hidden,),
        }
    }
    for i in range(shape["num_hidden_layers"]):
        files[f"block-{i:02d}.safetensors"] = {f"model.layers.{i}.{k}.weight": size for k, size in block.items()}
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for name, tensors in files.items():
        save_file({key: _random(size, generator) for key, size in tensors.items()}, folder / name)
        where |= dict.fromkeys(tensors, name)
    total = sum(2 * math.prod(size) for tensors in files.values() for size in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms of one; weights that keep the size of what passes them."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size).normal_(0, size[1] ** -0.5, generator=generator).to(torch.bfloat16)


def quantize(folder: Path, method: str, paged: bool, sequences: int) -> dict[str, Any]:
    """Quantize in this process; the most memory that it held."""
    from harness.driver import quantize_to_files
    from harness.models import load_model
    from harness.placement import Placement
    from harness.progress import silent
    from harness.registry import method_class
    from harness.settings import Setting

    with tempfile.TemporaryDirectory() as windows:
        model = load_model(folder, name=folder.name, placement=Placement(paged=paged))
        _, create = method_class(method)
        ids = torch.randint(0, 4000, (sequences, 256), generator=torch.Generator().manual_seed(0))
        quantize_to_files(
            model, create(), Setting.parse("W4A16g128"), ids, seed=0, checkpoints=Path(windows), progress=silent
        )
    return {"peak_bytes": processes.peak_resident_bytes()}


def depth(folder: Path, figure: Path) -> None:
    """Peak memory over the number of blocks, read block by block and in memory."""
    peaks: dict[str, list[int]] = {"block by block": [], "in memory": []}
    for blocks in DEPTHS:
        model = folder / f"{blocks}-blocks"
        if not (model / "model.safetensors.index.json").is_file():
            make(model, NARROW | {"num_hidden_layers": blocks})
        for kind, found in peaks.items():
            words = [sys.executable, "-P", __file__, "quantize", str(model), "--placement", kind, "--sequences", "1"]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            found.append(int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"]))
            print(f"{blocks} blocks, {kind}: {found[-1] / 1e6:,.0f} MB", flush=True)
    _draw(peaks, figure)


def _draw(peaks: dict[str, list[int]], figure: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "harness"
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for (kind, found), colour, marker in zip(peaks.items(), (BLUE, GREY), "os", strict=True):
        axes.plot(DEPTHS, [peak / 1e9 for peak in found], color=colour, marker=marker, label=kind)
        axes.annotate(kind, (DEPTHS[-1], found[-1] / 1e9), xytext=(-6, 6), textcoords="offset points", ha="right")
    axes.set(xlabel="decoder blocks", ylabel="peak resident memory, GB", xticks=DEPTHS, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(figure, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "quantize", "depth"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--placement", default="block by block", choices=["block by block", "in memory"])
    parser.add_argument("--sequences", type=int, default=8, help="of 256 tokens, to calibrate on")
    parser.add_argument("--figure", type=Path, default=Path("memory_depth.svg"))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    match asked.what:
        case "make":
            make(asked.folder, LLAMA2_7B)
        case "quantize":
            paged = asked.placement == "block by block"
            print(json.dumps(quantize(asked.folder, asked.method, paged, asked.sequences)))
        case "depth":
            depth(asked.folder, asked.figure)


if __name__ == "__main__":
    main()
