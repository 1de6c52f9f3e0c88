"""One layer's problem for GPTQ, as several tests pose it: a weight, correlated inputs, their Hessian."""

import torch
from hypothesis import strategies as st

from harness.hessian import Hessian
from harness.methods.gptq import GPTQ
from harness.quantizer import WeightFormat, decode
from harness.reconstruction import Solution, factorize

FORMATS = st.builds(
    WeightFormat,
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([None, 8, 16]),
    symmetric=st.booleans(),
    axis=st.sampled_from(["oc", "ic"]),
)
SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Activations with structure: AR(0.7) along the channels, some of them much larger."""
    x = random(tokens, features, seed=seed)
    for j in range(1, features):
        x[:, j] = 0.7 * x[:, j - 1] + 0.7 * x[:, j]
    return x * (1 + 10 * (torch.arange(features) % 17 == 3))


def hessian(x: torch.Tensor) -> Hessian:
    return Hessian.of(x.split(64))


def solve(method: GPTQ, weight: torch.Tensor, h: Hessian, format: WeightFormat) -> Solution:
    problem = factorize(h, method.damp, where="layer", allow_rtn_fallback=method.allow_rtn_fallback)
    return method.solve(weight, weight, problem, format)


def values(solution: Solution) -> torch.Tensor:
    return decode(solution.codes, solution.grid)
