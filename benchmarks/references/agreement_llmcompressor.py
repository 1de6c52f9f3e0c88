"""`quantize_weight` of llmcompressor 0.14.0.1 on the problems of agreement.py, in the library's own environment:

python benchmarks/references/agreement_llmcompressor.py problems.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from comparing import DAMP, GROUP_SIZE, Problem, compare
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight


def codes(problem: Problem) -> torch.Tensor:
    args = QuantizationArgs(
        num_bits=problem.bits,
        symmetric=False,
        strategy="group",
        group_size=GROUP_SIZE,
        actorder=ActivationOrdering.STATIC if problem.act_order else None,
    )
    values, _, fallback = quantize_weight(
        problem.weight[None].clone(),
        problem.hessian[None].clone(),
        scale=problem.scales[None],
        zero_point=problem.zeros[None] - 2 ** (problem.bits - 1),  # its codes are signed
        global_scale=None,
        quant_args=args,
        percdamp=DAMP,
    )
    assert not fallback.any()
    return problem.codes_of(values[0])


if __name__ == "__main__":
    compare(Path(sys.argv[1]), codes)
