"""Layers, Hessians and grids on which released GPTQ functions are compared with the harness's, code by code.

    python benchmarks/references/agreement.py smollm2-135m ids.safetensors problems.safetensors

in the harness's own environment; then `agreement_llmcompressor.py` and `agreement_gptqmodel.py` in theirs. With the
codes goes the exact position of every weight between its levels at the moment it is rounded, in float64: where a
library disagrees, it shows how near to a tie the weight was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from harness.hessian import Hessian
from harness.methods.gptq import GPTQ
from harness.models import load_model
from harness.presets import resolve_model
from harness.quantizer import WeightFormat, decode, expand
from harness.reconstruction import Factorization, Solution, factorize

LAYERS = tuple(f"model.layers.{i}.{name}" for i in (1, 28) for name in ("self_attn.q_proj", "mlp.down_proj"))
GROUP_SIZE, DAMP, SEQUENCES = 64, 0.01, 8


def real_layers(model_name: str, calibration: Path) -> Iterator[tuple[str, torch.Tensor, Hessian]]:
    """Layers of the full-precision model, with the Hessians of ``SEQUENCES`` calibration sequences."""
    folder = resolve_model(model_name).path
    assert folder is not None, f"run: harness models fetch {model_name}"
    model = load_model(folder, name=model_name)
    seen: dict[str, torch.Tensor] = {}
    for name in LAYERS:
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)})
        )
    with torch.no_grad():
        model.module.base_model(load_file(calibration)["ids"][:SEQUENCES], use_cache=False)
    for name in LAYERS:
        linear = model.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield name, linear.weight.detach(), Hessian.of([seen[name]])


def random_layers() -> Iterator[tuple[str, torch.Tensor, Hessian]]:
    """Normal weights; inputs correlated along the channels, some of them much larger."""
    for seed, (out, inputs) in enumerate(((320, 512), (640, 256))):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4096, inputs, generator=generator)
        for j in range(1, inputs):
            x[:, j] = 0.7 * x[:, j - 1] + 0.7 * x[:, j]
        x *= 1 + 10 * (torch.arange(inputs) % 37 == 3)
        yield f"random{seed}", torch.randn(out, inputs, generator=generator), Hessian.of([x])


def exact_positions(
    weight: torch.Tensor, solution: Solution, problem: Factorization, order: torch.Tensor
) -> torch.Tensor:
    """Where each weight lies between its levels when it is rounded, given the codes of the columns before it.

    ΔW = E U gives every column's error from the codes alone, and ŵ_j + e_j U_jj is the value that was rounded.
    """
    hessian = problem.hessian.double()[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rounded = decode(solution.codes, solution.grid).double()[:, order]
    errors = torch.linalg.solve_triangular(factor, weight.double()[:, order] - rounded, upper=True, left=False)
    scales, zeros = (t.expand(weight.shape)[:, order].double() for t in expand(solution.grid, weight.shape))
    positions = torch.empty(weight.shape, dtype=torch.float64)
    positions[:, order] = (rounded + errors * factor.diagonal()) / scales + zeros
    return positions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight, hessian in (*real_layers(asked.model, asked.calibration), *random_layers()):
        problem = factorize(hessian, DAMP, where=name, allow_rtn_fallback=False)
        tensors |= {f"{name}|weight": problem.without_dead(weight).clone(), f"{name}|hessian": hessian.matrix}
        for bits, act_order in product((4, 3, 2), (True, False)):
            method = GPTQ(damp=DAMP, act_order=act_order)
            format = WeightFormat(bits, GROUP_SIZE)
            solution = method.solve(weight, weight, replace(problem), format)
            order = method.order(problem.diagonal, format)
            key = f"{name}|{bits}|{'act-order' if act_order else 'plain order'}"
            tensors |= {
                f"{key}|scales": solution.grid.scales.float(),
                f"{key}|zeros": solution.grid.zeros.float(),
                f"{key}|codes": solution.codes,
                f"{key}|order": order,
                f"{key}|positions": exact_positions(weight, solution, problem, order),
            }
    save_file(tensors, asked.out)
