"""The `GPTQ` class of gptqmodel 7.6.0 on the problems of agreement.py, in the library's own environment:

python benchmarks/references/agreement_gptqmodel.py problems.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from comparing import DAMP, GROUP_SIZE, Problem, compare
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from gptqmodel.quantization.quantizer import Quantizer

SAMPLES = 2  # it multiplies its Hessian by 2 / samples: with two samples by one


class Float16Scales(Quantizer):
    """The library's min-max range, with the scale rounded to float16 before the zero point is computed from it."""

    def find_params(self, x: torch.Tensor, weight: bool = False) -> None:
        super().find_params(x, weight)
        self.scale = self.scale.half().float()
        self.zero = (-x.amin(dim=1, keepdim=True).clamp(max=0) / self.scale).round().clamp(0, self.maxq)


def codes(problem: Problem) -> torch.Tensor:
    linear = torch.nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    linear.weight.data.copy_(problem.weight)
    config = QuantizeConfig(
        bits=problem.bits,
        group_size=GROUP_SIZE,
        sym=False,
        desc_act=problem.act_order,
        act_group_aware=False,
        static_groups=True,
        damp_percent=DAMP,
        device="cpu",
    )
    solver = GPTQ(linear, config)
    solver.quantizer = Float16Scales(config)
    solver.quantizer.configure(perchannel=True)
    cpu = torch.device("cpu")
    solver._device_hessian_partials[cpu] = problem.hessian.clone()
    solver._device_sample_counts[cpu] = SAMPLES
    solver._hessian_dirty, solver.nsamples = True, SAMPLES
    values, scales, zeros, *_, damp, _ = solver.quantize()
    assert damp == DAMP
    assert torch.equal(scales, problem.scales) and torch.equal(zeros, problem.zeros)
    return problem.codes_of(values)


if __name__ == "__main__":
    compare(Path(sys.argv[1]), codes)
