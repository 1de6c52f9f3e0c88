"""On a machine with a GPU, in one command: numerics on the device, then tuning, then times; nothing wrong is timed.

    python -P benchmarks/gpu_verify.py --shapes llama2-7b --out runs/gpu

Numerics first: every kernel against float64 and integer references on the CPU. Then each shape and number of tokens
is tuned over a few configurations, and the winners are kept in kernels/tuned/, one file per GPU model. Then they are
timed beside torch's half-precision product, interleaved, with the L2 cache flushed before every call. Times are printed
only if all numerics held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness import atomic, provenance
from harness.kernels.bench import NO_CUDA, SHAPES
from harness.kernels.configs import Config, Kernel, key, write_tuned
from harness.kernels.gpu import launch
from harness.kernels.pack import PackedLinear, pack
from harness.kernels.timing import CudaTimer, Samples, interleaved, ratio
from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec, encode_tokens

TOKENS = (1, 4, 16, 64, 256, 2048)
SECONDS_OF_TUNING = 300
CANDIDATES: dict[Kernel, list[Config]] = {
    "wna16_gemv": [Config(4, n, s, w, 3) for n, s, w in itertools.product((8, 16, 32), (1, 4, 8), (2, 4))],
    "wna16": [
        Config(m, n, s, w, stages)
        for m, n, s, w, stages in itertools.product((16, 64, 128), (64, 128), (1, 4), (4, 8), (2, 3, 4))
    ],
    "wna8": [
        Config(m, n, 1, w, stages) for m, n, w, stages in itertools.product((16, 64, 128), (64, 128), (4, 8), (3, 4))
    ],
}


def random_layer(outputs: int, inputs: int, group: int | None, activation: ActivationSpec | None) -> QuantizedLinear:
    """A 4-bit layer with random codes, scales and zero points."""
    grid = (outputs, inputs // (group or inputs))
    return QuantizedLinear(
        codes=torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8),
        scales=(torch.rand(grid) * 0.01 + 0.01).half(),
        zeros=torch.randint(0, 16, grid, dtype=torch.uint8),
        bits=4,
        group_size=group or inputs,
        activation=activation,
    )


def wrong() -> Iterator[str]:
    """What a kernel on the device computes otherwise than the reference on the CPU."""
    for rows, (outputs, inputs), group, dtype in itertools.product(
        (1, 3, 17, 130), ((200, 576), (4096, 4096)), (64, None), (torch.float16, torch.bfloat16)
    ):
        linear = random_layer(outputs, inputs, group, None)
        layer, x = pack(linear).to("cuda"), torch.randn(rows, inputs).to(dtype)
        weight = linear.weight().to(dtype).double()
        exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        epsilon = 2.0**-11 if dtype == torch.float16 else 2.0**-8
        bound = 4 * 2.0**-24 * inputs**0.5 * magnitude + 2 * epsilon * exact.abs() + 1e-6
        for config in (Config(16, 64, 1), Config(128, 128, 1, 8, 2), Config(16, 64, 4), Config(4, 16, 2)):
            if rows > config.block_m and config.block_m < 16:
                continue
            y = launch.weight_only(x.cuda(), layer, config).cpu().double()
            if ((y - exact).abs() > bound).any():
                yield f"weight-only {rows}×{outputs}×{inputs} g{group} {dtype} {config}"
    for rows, (outputs, inputs), spec in itertools.product(
        (1, 17, 130), ((200, 576), (4096, 4096)), (ActivationSpec(8), ActivationSpec(4), ActivationSpec(8, True))
    ):
        linear = random_layer(outputs, inputs, None, spec)
        layer, x = pack(linear).to("cuda"), torch.randn(rows, inputs).half()
        quantized = launch.quantize_rows(x.cuda(), spec, layer)
        codes, scale, zero = encode_tokens(x, spec)
        if not torch.equal(quantized.codes[:, :inputs].cpu().int(), codes.int() - 2 ** (spec.bits - 1)):
            yield f"quantizing {rows}×{inputs} {spec}"
        total = (codes.long() - zero.long()) @ (linear.codes.long() - linear.zeros.long()).T
        exact = total.float() * linear.scales[:, 0].float() * scale
        for config in (Config(16, 64), Config(128, 128, 1, 8, 3)):
            if not torch.equal(launch.integer(quantized, layer, config, torch.float32).cpu(), exact):
                yield f"integer {rows}×{outputs}×{inputs} {spec} {config}"


def runs(kernel: Kernel, layer: PackedLinear, x: torch.Tensor, config: Config) -> Any:
    """The kernel as a callable; quantizing the input is timed as a part of its own."""
    if kernel == "wna8":
        assert layer.activation is not None
        quantized = launch.quantize_rows(x, layer.activation, layer)
        return lambda: launch.integer(quantized, layer, config, torch.float16)
    return lambda: launch.weight_only(x, layer, config)


def tuned(kernel: Kernel, layer: PackedLinear, x: torch.Tensor, timer: CudaTimer, deadline: float) -> Config | None:
    """The fastest configuration that launches; None when the time for tuning is over."""
    best: tuple[float, Config] | None = None
    for config in CANDIDATES[kernel]:
        if time.monotonic() > deadline:
            break
        if (config.block_m < 16) != (kernel == "wna16_gemv") or (kernel == "wna16_gemv" and len(x) > config.block_m):
            continue
        try:
            work = runs(kernel, layer, x, config)
            work()
        except Exception as error:  # noqa: BLE001  # more shared memory or registers than this GPU has
            print(f"  {config}: {type(error).__name__}", file=sys.stderr)
            continue
        seconds = min(timer(work, flush=True) for _ in range(8))
        best = min(best, (seconds, config), key=lambda pair: pair[0]) if best else (seconds, config)
    return best[1] if best else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama2-7b", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_CUDA)
        return 1
    if faults := list(wrong()):
        print("wrong on this GPU, so nothing is timed:", *faults, sep="\n  ")
        return 1
    print("numerics hold on the device")
    gpu, timer, deadline = torch.cuda.get_device_name(0), CudaTimer(), time.monotonic() + SECONDS_OF_TUNING
    winners: dict[str, Config] = {}
    rows: list[dict[str, Any]] = []
    for (outputs, inputs), tokens in itertools.product(SHAPES[asked.shapes], TOKENS):
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.float16)
        dense = torch.randn(outputs, inputs, device="cuda", dtype=torch.float16)
        paths: list[tuple[Kernel, int | None, ActivationSpec | None]] = [
            ("wna16", 128, None),
            ("wna8", None, ActivationSpec(8)),
        ]
        paths += [("wna16_gemv", 128, None)] if tokens <= 4 else []
        for kernel, group, spec in paths:
            layer = pack(random_layer(outputs, inputs, group, spec)).to("cuda")
            config = tuned(kernel, layer, x, timer, deadline)
            if config is None:
                print(f"{kernel} {outputs}×{inputs} {tokens}: no time left to tune", file=sys.stderr)
                continue
            winners[key(kernel, tokens, outputs, inputs)] = config
            works = {
                "fp16": lambda x=x, w=dense: torch.nn.functional.linear(x, w),
                "kernel": runs(kernel, layer, x, config),
            }
            if spec is not None:
                works["quantizing the input"] = lambda x=x, s=spec, y=layer: launch.quantize_rows(x, s, y)
            samples = interleaved(works, timer, rounds=20)
            rows.append(_row(kernel, outputs, inputs, tokens, config, samples))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "samples_seconds"}))
    fingerprint = {"gpu": gpu, **provenance.capture(torch.get_num_threads())}
    print("tuned:", write_tuned(gpu, fingerprint, winners))
    atomic.write_json(asked.out / "gpu.json", {"fingerprint": fingerprint, "rows": rows})
    return 0


def _row(
    kernel: str, outputs: int, inputs: int, tokens: int, config: Config, samples: dict[str, Samples]
) -> dict[str, Any]:
    return {
        "kernel": kernel, "outputs": outputs, "inputs": inputs, "tokens": tokens, "config": str(config),
        "median_seconds": samples["kernel"].median, "faster_than_fp16": ratio(samples["fp16"], samples["kernel"]),
        "quantizing_seconds": samples["quantizing the input"].median if "quantizing the input" in samples else None,
        "drifted": any(s.drifted for s in samples.values()),
        "samples_seconds": {name: s.seconds for name, s in samples.items()},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
