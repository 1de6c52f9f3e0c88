"""The kernels that run on this processor beside torch's products and beside their bare operators.

    tox -e bench -- benchmarks/test_kernels.py

All on one thread, interleaved, caches flushed before every call, in seconds that the thread had the processor: what
else runs on a shared machine is not the kernels' fault. Asserted are, of medians over the rounds:

- the path, activation quantization included, takes under 5 % more than its bare operator, and at W4A8 than torch's own
  integer operator with the same quantization before it and nothing after it;
- it is so many times as fast as bfloat16 as its case says. Of torch's int4 operator that is asked with AVX-512 only, by
  which it gains, as docs/kernels.md shows: where it runs without (no C compiler), the test is skipped with its ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from harness import provenance
from harness.kernels.bench import random_layer
from harness.kernels.benchfile import Samples, ratio
from harness.kernels.cpu import INT4_OPERATOR, IntegerProduct, IntegerWeights, qlinear
from harness.kernels.machines import Cpu, Ready
from harness.kernels.pack import pack
from harness.kernels.timing import CpuTimer, interleaved
from harness.linear import QuantizedLinear
from harness.settings import Setting

SIZE, ROUNDS, FLUSH_BYTES = 4096, 40, 256 << 20
FLAGS = set(provenance.cpu()["flags"])


@dataclass(frozen=True)
class Case:
    """``least``: how many times as fast as bfloat16."""

    setting: str
    tokens: int
    least: float


CASES = [Case("W4A16g128", 1, 3.0), Case("W4A16g64", 1, 3.0), Case("W4A8", 1, 3.0), Case("W4A8", 128, 1.3)]


@pytest.fixture(scope="module")
def machine() -> Cpu:
    return Cpu(CpuTimer(FLUSH_BYTES, time.thread_time))


def by_torch(linear: QuantizedLinear, x: torch.Tensor) -> Callable[[], object]:
    """Our quantization of the tokens, torch's product of such codes; zero points and scales are left out."""
    ours, torchs = IntegerWeights.of(pack(linear)), IntegerProduct.of(pack(linear))
    codes = torchs.given(x)[0]
    return lambda: (ours.given(x), qlinear(codes, torchs.weight, torchs.scales, torchs.weight_zeros))


def measured(machine: Cpu, case: Case) -> tuple[Ready, dict[str, Samples]]:
    linear = random_layer(SIZE, SIZE, Setting.parse(case.setting))
    with torch.inference_mode():
        ready = machine.layer(linear).ready(torch.randn(case.tokens, SIZE))
        works = {name: ready.works[name] for name in ("path", "operator", "bfloat16", "float32")}
        if case.setting == "W4A8":
            works["torch"] = by_torch(linear, ready.given)
        return ready, interleaved(works, machine.timer, rounds=ROUNDS, before=ready.redraw)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.setting}-{case.tokens}")
def test_kernel(benchmark, machine: Cpu, case: Case) -> None:
    """4096 × 4096."""
    ready, samples = measured(machine, case)
    found = {name: ratio(samples[name], samples["path"]) for name in samples if name != "path"}
    overhead = max(ratio(samples["path"], samples[name]) - 1 for name in ("operator", "torch") if name in samples)
    benchmark.extra_info.update({f"{name}_over_path": value for name, value in found.items()}, operator=ready.operator)
    with torch.inference_mode():
        benchmark.pedantic(ready.works["path"], rounds=ROUNDS, warmup_rounds=2)
    assert overhead < 0.05
    if ready.operator == INT4_OPERATOR and "avx512f" not in FLAGS:
        pytest.skip(f"{found['bfloat16']:.2f} × bfloat16 by {ready.operator}: {case.least} is asked with AVX-512")
    assert found["bfloat16"] >= case.least
