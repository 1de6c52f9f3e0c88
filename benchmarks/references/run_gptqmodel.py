"""GPTQ of gptqmodel 7.6.0 on the harness's calibration ids, on the CPU. In an environment of its own:

    pip install torch==2.13.0 gptqmodel==7.6.0        # 7.7.0 asks for torch 2.14.1
    export GPTQMODEL_CPU_WORKERS=2                    # without it the library fails on two cores
    python benchmarks/references/run_gptqmodel.py MODEL_FOLDER ids.safetensors out/gptqmodel.safetensors --bits 4

`defaults` leaves the library's ordering (group-aware, no act-order), damping (0.05) and grids (fresh) as they are;
`same-protocol` asks for act-order, static groups and damping 0.01. Both are asymmetric. The seconds include packing.
"""

from __future__ import annotations

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from protocol import SEQUENCES_AT_ONCE, Job, linears_of_blocks, stopwatch

VARIANTS = {
    "same-protocol": {"desc_act": True, "static_groups": True, "act_group_aware": False, "damp_percent": 0.01},
    "defaults": {},
}


def dequantized(module: torch.nn.Module) -> torch.Tensor | None:
    """[out, in] of a packed layer.

    Right after packing its zero points are stored less one, which the library undoes only when it loads a checkpoint.
    """
    if not hasattr(module, "dequantize_weight"):
        return None
    if module.qzero_format() == 1:
        convert_gptq_v1_to_v2_format_module(module, bits=module.bits, pack_dtype=module.pack_dtype)
        module.qzero_format(format=2)
    return module.dequantize_weight().T.float()


if __name__ == "__main__":
    job = Job.from_command_line(__doc__ or "", tuple(VARIANTS))
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        device="cpu",
        offload_to_disk=False,
        **VARIANTS[job.variant],
    )
    model = GPTQModel.load(str(job.model), config, dtype=torch.float32)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in job.ids()]
    with stopwatch() as took:
        model.quantize(samples, batch_size=SEQUENCES_AT_ONCE, backend=BACKEND.TORCH)
    job.write(linears_of_blocks(model.model, dequantized), took, "gptqmodel 7.6.0")
