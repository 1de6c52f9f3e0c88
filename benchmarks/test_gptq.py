"""How fast GPTQ is, as ratios to a textbook version in the same run: `tox -e bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.driver import quantize_model
from harness.hessian import Hessian
from harness.kernels.cpu import has_bf16_units
from harness.methods.gptq import GPTQ
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantizer import Grid, WeightFormat, expand, find_grid
from harness.reconstruction import StaticLevels, factorize, solve_columns
from harness.settings import Setting


def textbook_columns(weight: torch.Tensor, factor: torch.Tensor, grid: Grid, block_size: int = 128) -> torch.Tensor:
    """GPTQ's inner loop as it is usually written: a column, its error and loss, a rank-one update of the block."""
    scales, zeros = (t.expand(weight.shape) for t in expand(grid, weight.shape))
    weight, codes, losses = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    levels = 2**grid.format.bits - 1
    for start in range(0, weight.shape[1], block_size):
        end = min(start + block_size, weight.shape[1])
        block, errors = weight[:, start:end].clone(), torch.zeros(weight.shape[0], end - start)
        inner = factor[start:end, start:end]
        for j in range(end - start):
            w, s, z = block[:, j], scales[:, start + j], zeros[:, start + j]
            q = torch.clamp(torch.round(w / s) + z, 0, levels)
            rounded = s * (q - z)
            losses[:, start + j] = (w - rounded) ** 2 / inner[j, j] ** 2
            error = (w - rounded) / inner[j, j]
            block[:, j:] -= error.unsqueeze(1).matmul(inner[j, j:].unsqueeze(0))
            codes[:, start + j], errors[:, j] = q, error
        weight[:, end:] -= errors.matmul(factor[start:end, end:])
    return codes.to(torch.uint8)


def test_column_loop(benchmark, ratio) -> None:
    """A 1536 × 576 layer: at least five times a textbook loop, and the same codes."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1536, 576, generator=generator), torch.randn(4096, 576, generator=generator)
    grid, order = find_grid(weight, WeightFormat(4, 64)), torch.arange(576)
    problem = factorize(Hessian.of([x]), 0.01, where="layer", allow_rtn_fallback=False)
    factor = problem.factor(order)

    def ours() -> torch.Tensor:
        return solve_columns(weight, factor, order, StaticLevels(weight, grid, order), 128)

    assert (ours() != textbook_columns(weight, factor, grid)).float().mean() < 1e-3
    benchmark.extra_info["ratio to textbook"] = found = ratio(
        lambda: textbook_columns(weight, factor, grid), ours, rounds=21
    )
    benchmark(ours)
    assert found >= 5


def block(dtype: torch.dtype) -> LoadedModel:
    """One decoder block of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
    return LoadedModel(module, None, "block", Path())  # type: ignore[arg-type]


_SLOW = "this processor emulates bfloat16"
CALIBRATION = torch.randint(0, 1024, (8, 512), generator=torch.Generator().manual_seed(0))


def textbook_model(model: LoadedModel) -> None:
    """One Hessian and one factorization per linear, a textbook column loop, a second pass to propagate the error."""
    modules = model.module.model.named_modules()
    linears = {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}
    sums = {name: torch.zeros(m.in_features, m.in_features) for name, m in linears.items()}

    def accumulate(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            sums[name] += x.T @ x

        return hook

    hooks = [m.register_forward_pre_hook(accumulate(name)) for name, m in linears.items()]
    for chunk in CALIBRATION.split(4):
        model.module.model(input_ids=chunk, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        h = sums[name]
        h.diagonal().add_(0.01 * h.diagonal().mean())
        order = h.diagonal().argsort(descending=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
        factor = torch.linalg.cholesky(inverse, upper=True)
        textbook_columns(linear.weight[:, order], factor, find_grid(linear.weight[:, order], WeightFormat(4, 64)))
    for chunk in CALIBRATION.split(4):
        model.module.model(input_ids=chunk, use_cache=False)


@pytest.mark.parametrize(
    ("dtype", "least"),
    [
        (torch.float32, 1.5),
        pytest.param(torch.bfloat16, 3, marks=pytest.mark.skipif(not has_bf16_units(), reason=_SLOW)),
    ],
    ids=["float32", "bfloat16"],
)
def test_whole_block(benchmark, ratio, dtype: torch.dtype, least: float, tmp_path_factory) -> None:
    """Calibration, quantization and propagation of one block: so many times as fast as the textbook in float32."""
    textbook, made = block(torch.float32), block(dtype)

    def ours() -> None:
        quantize_model(
            made, GPTQ(), Setting.parse("W4A16g64"), CALIBRATION, seed=0,
            checkpoints=tmp_path_factory.mktemp("windows"), progress=silent,
        )  # fmt: skip

    found = ratio(lambda: textbook_model(textbook), ours, rounds=5)
    benchmark.extra_info["ratio to textbook"] = found
    benchmark.pedantic(ours, rounds=3)
    assert found >= least
