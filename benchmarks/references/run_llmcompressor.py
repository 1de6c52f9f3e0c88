"""GPTQ of llmcompressor 0.14.0.1 on the harness's calibration ids, on the CPU. In an environment of its own:

    pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/references/run_llmcompressor.py MODEL_FOLDER ids.safetensors out/llmcompressor.safetensors

Act-order with static groups, damping 0.01 and blocks of 128 columns are the library's own defaults.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from protocol import SEQUENCES_AT_ONCE, Job, linears_of_blocks, stopwatch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    job = Job.from_command_line(__doc__ or "")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.ids()]
    weights = QuantizationArgs(num_bits=job.bits, symmetric=False, strategy="group", group_size=job.group_size)
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        actorder="static",
        dampening_frac=0.01,
    )
    with stopwatch() as took:
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(job.model),
            dataset=DataLoader(samples, batch_size=SEQUENCES_AT_ONCE),
            recipe=recipe,
        )
    quantized = linears_of_blocks(model, lambda m: m.weight if hasattr(m, "weight_scale") else None)
    job.write(quantized, took, "llmcompressor 0.14.0.1")
