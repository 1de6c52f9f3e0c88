"""AutoRound 0.16.1 on the harness's calibration ids, on the CPU. In an environment of its own:

    pip install torch==2.13.0 auto-round==0.16.1
    python benchmarks/references/run_autoround.py MODEL_FOLDER ids.safetensors out/autoround.safetensors --bits 2

Asymmetric, batches of 8 sequences (its default); a variant is the number of iterations, of which 200 is its default.
Products in float32: bfloat16, its own choice, is emulated where there are no matrix units for it.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from protocol import Job, linears_of_blocks, stopwatch
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    job = Job.from_command_line(__doc__ or "", ("50", "10", "200"))
    ids = job.ids()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        iters=int(job.variant),
        dataset=[row[None] for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
    )
    with stopwatch() as took:
        quantized, _ = tuner.quantize()
    weights = linears_of_blocks(quantized, lambda m: m.weight if isinstance(m, torch.nn.Linear) else None)
    job.write(weights, took, "auto-round 0.16.1")
