"""What ``harness list`` shows, and ``harness models fetch``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from harness.presets import model_presets, resolve_model
from harness.registry import MethodInfo, describe_methods, import_failure
from harness.settings import ACTIVATION_BITS, KV_BITS, WEIGHT_BITS
from harness.specs import Option, show
from harness.tasks.catalogue import describe_tasks
from harness.tasks.presets import PRESETS

Row = tuple[str, str, str]


def rows(what: str) -> Iterator[Row]:
    """Name, summary and options of each thing of a kind: methods, models, tasks, settings or kernels."""
    kinds: dict[str, Callable[[], Iterator[Row]]] = {
        "methods": _methods, "models": _models, "tasks": _tasks, "settings": _settings,
        "kernels": _kernels,
    }  # fmt: skip
    return kinds[what]()


def _methods() -> Iterator[Row]:
    for info in describe_methods().values():
        broken = info.broken or (import_failure(info) if _is_foreign(info) else None)
        yield info.name, f"BROKEN: {broken}" if broken else info.summary, _options(info.options)


def _is_foreign(info: MethodInfo) -> bool:
    return bool(info.module) and not info.module.startswith("harness.")


def _models() -> Iterator[Row]:
    for preset in model_presets().values():
        here = "here" if resolve_model(preset.name).path else "not fetched"
        yield preset.name, preset.summary, f"{preset.hub or preset.wheel}, {here}"
    yield "<org/name[@revision]>", "any causal language model on the Hugging Face hub", ""
    yield "<folder>", "a checkpoint: config.json, *.safetensors, tokenizer files", ""


def _tasks() -> Iterator[Row]:
    for info in describe_tasks():
        yield info.name, info.summary, _options(info.options)
    for name, preset in PRESETS.items():
        tasks = ", ".join(f"{task} ({metric})" for task, metric in preset.tasks.items())
        yield name, f"{preset.summary}: {tasks}", "those of its tasks"


def _settings() -> Iterator[Row]:
    def bits(values: Sequence[int]) -> str:
        return ", ".join(map(str, values))

    yield "W<bits>", "weights, asymmetric, a scale per output channel", bits(WEIGHT_BITS)
    yield "A<bits>", "activations, per token, dynamic", bits(ACTIVATION_BITS)
    yield "KV<bits>", "keys and values of attention, per token and head (left out: not quantized)", bits(KV_BITS)
    yield "g<size>", "weights that share a scale (left out: an output channel)", "a divisor of every layer's inputs"
    yield "sym", "symmetric weights and activations", ""
    yield "W4A4KV4g64sym", "all of it; 16 bits means not quantized", ""


def _kernels() -> Iterator[Row]:
    gpu, cpu, ours = "GPU (Triton)", "CPU (torch)", "CPU (C)"
    yield "wna16", "W4A16, W2A16: dequantized in registers, half-precision tensor cores", gpu
    yield "wna16_gemv", "the same for up to 4 tokens, without tensor cores", gpu
    yield "wna8", "W4A8, W4A4: int8 tensor cores, zero points corrected exactly", gpu
    yield "act_quant", "activations per token: codes, scales, zero points, row sums", gpu
    yield "rotate_quantize, rotate_permute", "smooth, rotate, permute, rotate, quantize", gpu
    yield "w4a16_fixed_point", "W4A16 with activations in 16-bit fixed point", ours
    yield "wna8_integer", "W4A8, W4A4 in groups or not, with VNNI W8A8: exact sums, zero points included", ours
    yield "aten::_weight_int4pack_mm_for_cpu", "W4A16 in bfloat16, groups of 32 to 256 inputs", cpu
    yield "onednn::qlinear_pointwise", "the same of whole channels without a C compiler: uint8 × int8", cpu
    yield "aten::mm of bfloat16, dequantized", "every other packed layer", cpu


def _options(options: Sequence[Option]) -> str:
    return ", ".join(f"{option.name}={show(option.default)}" for option in options)
