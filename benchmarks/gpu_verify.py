"""On a machine with a GPU, in one command: numerics on the device, then tuning, then times; nothing wrong is timed.

    python -P benchmarks/gpu_verify.py --shapes llama2-7b --out runs/gpu

Numerics first: every kernel against float64 and integer references on the CPU, then a small model through its kernels
against its simulation, both on the device. Then each shape and number of tokens is tuned over a few configurations,
five minutes at the most; the winners are kept in kernels/tuned/, one file per GPU model. Then `harness bench` times
them, as it would by itself. Times are printed only if all numerics held.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness import provenance, tables
from harness.driver import quantize_model
from harness.errors import BadOutput
from harness.kernels.bench import SHAPES, bench, random_layer, record
from harness.kernels.benchfile import NO_CUDA
from harness.kernels.configs import Config, Kernel, key, shipped, tuned_file, write_tuned
from harness.kernels.difference import Executions, measure_difference
from harness.kernels.execute import kernel_modules, packed_layers
from harness.kernels.gpu import launch
from harness.kernels.gpu.path import GpuKernels, GpuPath, Hardware, Rotating
from harness.kernels.machines import Gpu, transform_of
from harness.kernels.pack import PackedLinear, pack
from harness.kernels.precision import check_precision
from harness.kernels.timing import CudaTimer, Timer
from harness.method import Method
from harness.methods.duquant import DuQuant
from harness.methods.rtn import RTN
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantizer import encode_tokens
from harness.reports import kernel_tables
from harness.settings import Setting

SETTINGS = [Setting.parse("W4A16g128"), Setting.parse("W4A8")]
TOKENS = (1, 4, 16, 64, 256, 2048)
SECONDS_OF_TUNING = 300
CANDIDATES: dict[Kernel, list[Config]] = {
    "wna16_gemv": [
        Config(m, n, s, w, 3) for m, n, s, w in itertools.product((1, 2, 4), (8, 16, 32), (1, 4, 8), (1, 2, 4))
    ],
    "wna16": [
        Config(m, n, s, w, stages)
        for m, (n, w), s, stages in itertools.product(
            (16, 64, 128), ((32, 2), (64, 4), (128, 4), (128, 8)), (1, 4), (2, 3, 4)
        )
    ],
    "wna16_ic": [
        Config(m, 64, s, w, stages) for m, s, w, stages in itertools.product((16, 64), (1, 4), (4, 8), (2, 3, 4))
    ],
    "wna8_grouped": [
        Config(m, n, 1, w, stages)
        for (m, n, w), stages in itertools.product(
            ((16, 32, 2), (16, 64, 4), (32, 128, 8), (64, 64, 4), (64, 64, 8)), (3, 4)
        )
    ],
    "wna8": [
        Config(m, n, 1, w, stages)
        for m, (n, w), stages in itertools.product((16, 64, 128), ((32, 2), (64, 4), (128, 4), (128, 8)), (3, 4))
    ],
    "rotate": [
        Config(m, n, 1, w, stages)
        for (m, n), w, stages in itertools.product(((1, 2048), (1, 4096), (4, 512), (16, 128)), (4, 8), (1, 2))
    ],
}
CANDIDATES["wna16_narrow"] = CANDIDATES["wna16"]
# What a layer of a model may be off by, relative, on the input that its simulation is given: its output's rounding;
# behind a transform, whose values are rounded too, some codes of the input are next to those of the simulation.
MODELS: dict[str, tuple[Method, float]] = {
    "W4A16g64": (RTN(), 2e-3),
    "W4A8": (DuQuant(max_rotation_step=4, weights="rtn"), 2e-2),
}


def wrong(
    device: str,
    sizes: Sequence[tuple[int, int]] = ((200, 576), (4096, 4096)),
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16),
    rows: Sequence[int] = (1, 3, 17, 130),
    tokens: int = 64,
) -> Iterator[str]:
    """What a kernel on the device computes otherwise than the reference on the CPU.

    ``rows`` of inputs, of layers of these ``sizes``; ``tokens``: how many a whole model is run on.
    """
    yield from _wrong_weight_only(device, rows, sizes, dtypes)
    yield from _wrong_integers(device, rows, sizes)
    yield from _wrong_transforms(device, rows, sizes)
    yield from _wrong_models(device, dtypes[0], tokens)


def _wrong_weight_only(
    device: str, rows: Sequence[int], sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> Iterator[str]:
    for count, (outputs, inputs), setting, dtype in itertools.product(
        rows, sizes, ("W4A16g64", "W4A16", "W4A16sym", "W2A16g64"), dtypes
    ):
        linear = random_layer(outputs, inputs, Setting.parse(setting))
        layer, x = pack(linear).to(device), torch.randn(count, inputs).to(dtype)
        weight = linear.weight().to(dtype).double()
        exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        epsilon = 2.0**-11 if dtype == torch.float16 else 2.0**-8
        bound = 4 * 2.0**-24 * inputs**0.5 * magnitude + 2 * epsilon * exact.abs() + 1e-6
        for config in (Config(16, 32, 1, 2, 4), Config(64, 128, 1, 8, 3), Config(16, 64, 4), Config(4, 16, 2)):
            if count > config.block_m and config.block_m < 16:
                continue
            y = launch.weight_only(x.to(device), layer, config).cpu().double()
            if not ((y - exact).abs() <= bound).all():
                yield f"weight-only {count}×{outputs}×{inputs} {setting} {dtype} {config}"


def _wrong_integers(device: str, rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    for count, (outputs, inputs), setting in itertools.product(rows, sizes, ("W4A8", "W4A4", "W4A8sym")):
        linear = random_layer(outputs, inputs, Setting.parse(setting))
        spec = linear.activation
        assert spec is not None
        layer, x = pack(linear).to(device), torch.randn(count, inputs).half()
        quantized = launch.quantize_rows(x.to(device), spec, layer)
        codes, scale, zero = encode_tokens(x, spec)
        if not torch.equal(quantized.codes[:, :inputs].cpu().int(), codes.int() - 2 ** (spec.bits - 1)):
            yield f"quantizing {count}×{inputs} {setting}"
        total = (codes.long() - zero.long()) @ (linear.codes.long() - linear.zeros.long()).T
        exact = total.float() * linear.scales[:, 0].float() * scale
        for config in (Config(16, 64), Config(128, 128, 1, 8, 3)):
            if not torch.equal(launch.integer(quantized, layer, config, torch.float32).cpu(), exact):
                yield f"integer {count}×{outputs}×{inputs} {setting} {config}"


def _wrong_transforms(device: str, rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    for count, (outputs, inputs), fused, config in itertools.product(
        rows, sizes, (True, False), shipped("rotate", "sm_80")
    ):
        linear = random_layer(outputs, inputs, Setting.parse("W4A8"))
        transform, x, layer = transform_of(linear), torch.randn(count, inputs).half(), pack(linear).to(device)
        rotations = launch.Rotations.of(transform.to(device), x.dtype)
        moved = x.to(device)
        given = (moved, rotations) if fused else (launch.rotate_permute(moved, rotations), rotations.rest)
        y = launch.rotate(*given, config)
        exact = transform.apply(x.float())
        case = f"{count}×{inputs} {'in one kernel' if fused else 'in two'} {config}"
        if not ((y.cpu().float() - exact).abs() <= 2e-3 * exact.abs().amax(1, keepdim=True)).all():
            yield f"rotation {case}"
        assert layer.activation is not None
        alone = launch.quantize_rows(y, layer.activation, layer)
        at_once = launch.rotate_quantize(*given, layer.activation, layer, config)
        if not torch.equal(alone.codes, at_once.codes):
            yield f"rotation and codes {case}"


def _wrong_models(device: str, dtype: torch.dtype, tokens: int) -> Iterator[str]:
    """Whole models, as a cell with ``--execute kernels`` runs them."""
    at = torch.device(device)
    kernels = GpuKernels.of(at) if at.type == "cuda" else GpuKernels(Hardware("sm_80", 4))  # under the interpreter
    ids = torch.randint(512, (2, tokens))
    for setting, (method, bound) in MODELS.items():
        model = small_model()
        with tempfile.TemporaryDirectory() as folder:
            quantized = quantize_model(
                model, method, Setting.parse(setting), ids, seed=0, checkpoints=Path(folder), progress=silent
            )
        model.module.to(at, dtype)  # type: ignore[call-overload]
        quantized.install(model.module, model.architecture)
        modules = kernel_modules(packed_layers(quantized.linears), model.architecture.shared_inputs, at, kernels)
        simulation = {name: model.module.get_submodule(name) for name in modules}
        try:
            operators = check_precision(modules, [1, tokens], dtype)
        except BadOutput as error:
            yield f"model {setting}: {error.what}"
            continue
        both = Executions(simulation, modules, operators)
        result = measure_difference("model", model.module, both, ids[:1], {}, lambda done, of: None)
        error = next(row.value for row in result.measurements if row.metric == "max_layer_error")
        if not error <= bound:
            yield f"model {setting} {dtype}: a layer is off by {error:.2g}"


def small_model() -> LoadedModel:
    """A random Llama of one block, without a tokenizer."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel(module, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel())), "small", Path())


def runs(kernel: Kernel, layer: PackedLinear, x: torch.Tensor, config: Config) -> Callable[[], torch.Tensor]:
    """The kernel as a callable; quantizing the input is left out."""
    if kernel.startswith("wna8"):
        assert layer.activation is not None
        quantized = launch.quantize_rows(x, layer.activation, layer)
        return lambda: launch.integer(quantized, layer, config, torch.float16)
    return lambda: launch.weight_only(x, layer, config)


def candidates(kernel: Kernel, config: Config, tokens: int) -> Iterator[Config]:
    """As shipped, and then those whose block is no larger than the tokens need; few tokens are all in one block."""
    yield config
    enough = min((c.block_m for c in CANDIDATES[kernel] if c.block_m >= tokens), default=tokens)
    least = enough if kernel == "wna16_gemv" else 1
    yield from (c for c in CANDIDATES[kernel] if c != config and least <= c.block_m <= enough)


def fastest(
    works: Callable[[Config], Callable[[], torch.Tensor]], tried: Iterable[Config], timer: Timer, deadline: float
) -> Config | None:
    """The fastest configuration that launches and answers as the first, the shipped one; None where there was time for
    none."""
    best: tuple[float, Config] | None = None
    expected: torch.Tensor | None = None
    for config in tried:
        if time.monotonic() > deadline:
            break
        try:
            work = works(config)
            answer = work().float()
            expected = answer if expected is None else expected
            difference = (answer - expected).norm() / expected.norm()
            if not float(difference) < 1e-2:
                print(f"  {config}: wrong, off by {float(difference):.2g}", file=sys.stderr)
                continue
        except Exception as error:  # more shared memory or registers than this GPU has
            if expected is None:
                raise  # what is shipped
            print(f"  {config}: {type(error).__name__}", file=sys.stderr)
            continue
        seconds = min(timer(work, flush=True) for _ in range(8))
        best = min(best, (seconds, config), key=lambda pair: pair[0]) if best else (seconds, config)
    return best[1] if best else None


def tune(shapes: Sequence[tuple[int, int]]) -> dict[str, Config]:
    """The fastest candidate for every kernel, shape and number of tokens that the time is enough for."""
    timer, deadline = CudaTimer(), time.monotonic() + SECONDS_OF_TUNING
    hardware = Hardware.of(torch.device("cuda"))
    winners: dict[str, Config] = {}

    def keep(
        kernel: Kernel, config: Config, tokens: int, outputs: int, inputs: int,
        works: Callable[[Config], Callable[[], torch.Tensor]],
    ) -> None:  # fmt: skip
        if best := fastest(works, candidates(kernel, config, tokens), timer, deadline):
            winners[key(kernel, tokens, outputs, inputs)] = best
        else:
            print(f"{kernel} {outputs}×{inputs} {tokens}: no time left to tune, as shipped", file=sys.stderr)

    for tokens, (outputs, inputs) in itertools.product(TOKENS, shapes):
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.float16)
        for setting in SETTINGS:
            path = GpuPath(pack(random_layer(outputs, inputs, setting)).to("cuda"), hardware)
            kernel, config = path.config(tokens)
            keep(kernel, config, tokens, outputs, inputs, functools.partial(runs, kernel, path.layer, x))
    for tokens, inputs in itertools.product(TOKENS, sorted({inputs for _, inputs in shapes})):
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.float16)
        linear = random_layer(64, inputs, SETTINGS[-1])
        rotating = Rotating(GpuPath(pack(linear).to("cuda"), hardware), transform_of(linear).to("cuda"), hardware)
        keep("rotate", rotating.config(tokens), tokens, inputs, inputs, functools.partial(_rotates, rotating, x))
    return winners


def _rotates(rotating: Rotating, x: torch.Tensor, config: Config) -> Callable[[], torch.Tensor]:
    """In as many kernels as run: the last one has the configuration."""
    return lambda: launch.rotate(*rotating.begun(x), config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama2-7b", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"GPU: {NO_CUDA}")
        return 1
    if faults := list(wrong("cuda")):
        print("wrong on this GPU, so nothing is timed:", *faults, sep="\n  ")
        return 1
    print("numerics hold on the device")
    with torch.inference_mode():
        winners = tune(SHAPES[asked.shapes])
    fingerprint = {"gpu": torch.cuda.get_device_name(0), **provenance.capture(torch.get_num_threads())}
    gpu = torch.cuda.get_device_name(0)
    before = tuned_file(gpu).read_bytes() if tuned_file(gpu).is_file() else None
    tuned = write_tuned(gpu, fingerprint, winners)
    machine = Gpu()  # chooses what was tuned just now
    try:
        found = record(list(bench(SETTINGS, SHAPES[asked.shapes], TOKENS, machine)), machine)
    except BadOutput as error:
        tuned.unlink() if before is None else tuned.write_bytes(before)
        print(f"what was tuned is wrong, and not kept: {error}")
        return 1
    print("tuned:", tuned)
    print(tables.markdown(kernel_tables.grids([found])))
    print("samples:", found.write(asked.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
