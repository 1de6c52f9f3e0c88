"""What the regression gate lets pass and what it catches, on a real model.

    python -P benchmarks/gate.py smollm2-135m --settings W4A16g64,W4A8 --pairs 50

Baseline: every linear rounded to nearest. A/A pairs: its weights off by rounding errors of one part in 100,000, as
other hardware's arithmetic would have them. Then each fault is planted in one layer of one cell, in the first, a middle
and the last block. The tasks are perplexity and divergence on pydoc; every candidate goes through run folders and the
gate itself, which is asked for the integers too (``--margins integers=0``).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from planted import FAULTS, cell, rounded, with_fault, write_run

from harness.fetch import fetch
from harness.models import load_model
from harness.presets import resolve_model
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.reports.compare import INTEGERS, Gate, compare_runs
from harness.settings import Setting
from harness.tasks.catalogue import parse_task
from harness.tasks.measurement import TaskResult
from harness.tasks.perplexity import measure_windows

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
NOISE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--settings", default="W4A16g64,W4A8")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()
    folder = fetch(resolve_model(asked.model), lambda *_: None)
    reference, model = (load_model(folder, name=asked.model, dtype="float32") for _ in range(2))
    keys = [f"{name}:length={asked.length}:windows={asked.windows}" for name in ("pydoc", "pydoc_kl")]
    specs = [parse_task(key) for key in keys]

    def measure(quantized: QuantizedModel, seed: int | None = None) -> list[TaskResult]:
        quantized.install(model.module, reference.architecture)
        generator = torch.Generator().manual_seed(seed or 0)
        for name in quantized.linears if seed is not None else ():
            weight = model.module.get_submodule(name).weight
            weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
        return measure_windows(specs, model, lambda: reference, None, silent)

    settings = asked.settings.split(",")
    good = {setting: rounded(reference, Setting.parse(setting)) for setting in settings}
    results = {setting: measure(good[setting]) for setting in settings}
    with tempfile.TemporaryDirectory() as scratch:
        gate = _gate(Path(scratch), results, good, keys)
        passed = sum(
            not gate({**results, setting: measure(good[setting], seed)}, good).failed
            for number in range(asked.pairs)
            for setting, seed in [(settings[number % len(settings)], number)]
        )
        print(f"A/A pairs that pass: {passed} of {asked.pairs}\n", flush=True)
        print("| fault | cell | layer | perplexity | divergence | by samples | by integers |\n" + "|" + " --- |" * 7)
        blocks = reference.architecture.blocks
        layers = [
            f"{blocks[at].name}.{linear}"
            for at, linear in zip((0, len(blocks) // 2, len(blocks) - 1), LINEARS, strict=True)
        ]
        for name, fault in FAULTS.items():
            for setting in settings:
                for layer in layers:
                    faulty = with_fault(reference, good[setting], layer, fault, Setting.parse(setting))
                    found = gate({**results, setting: measure(faulty)}, {**good, setting: faulty})
                    names = {check.place[1] for check in found.failed}
                    by_integers = {check.place[1] for check in found.failed if check.what == INTEGERS}
                    by_samples = any(check.what != INTEGERS for check in found.failed)
                    caught = f"{_word(by_samples)} | {_word(names == by_integers == {setting})}"
                    print(f"| {name} | {setting} | {layer} | {_differences(found, setting)} | {caught} |", flush=True)


def _gate(
    scratch: Path, results: dict[str, list[TaskResult]], good: dict[str, QuantizedModel], keys: list[str]
) -> Callable[..., Gate]:
    """Compares with ``results`` and the integers ``good``; the folders of candidates are gone once they were read."""

    def written(name: str, found: dict[str, list[TaskResult]], integers: dict[str, QuantizedModel]) -> Path:
        return write_run(
            scratch / name, [(cell(setting, keys), one) for setting, one in found.items()], integers=integers
        )

    baseline = written("baseline", results, good)

    def gate(found: dict[str, list[TaskResult]], integers: dict[str, QuantizedModel]) -> Gate:
        candidate = written("candidate", found, integers)
        try:
            return compare_runs(baseline, candidate, {INTEGERS: 0.0})
        finally:
            shutil.rmtree(candidate)

    return gate


def _differences(gate: Gate, setting: str) -> str:
    shown = {check.what.split()[-1]: check.detail for check in gate.checks if check.place[1] == setting}
    return f"{shown['token_perplexity']} | {shown['kl_divergence']}"


def _word(caught: bool) -> str:
    return "yes" if caught else "**no**"


if __name__ == "__main__":
    main()
