"""Compile the shipped kernels ahead of time, for GPUs that are not here."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.kernels.configs import Config, Kernel, shipped
from harness.kernels.sass import Binary, read_amd, read_nvidia
from harness.paths import cache_dir

_POINTERS = {
    "qweight": "*i16", "scales": "*fp16", "zeros": "*i16", "x_scales": "*fp32", "x_zeros": "*i32", "row_sums": "*i32",
    "code_sums": "*i32", "targets": "*i32",
}  # fmt: skip
# What a layer's sizes are divisible by where vector loads are to be used; the launcher finds it out from the values.
_DIVISIBLE = ("N", "K", "padded_in", "padded_out", "stride_x")


@dataclass(frozen=True)
class Variant:
    """A kernel with all that is fixed when it is compiled. ``of`` is its family, which expectations go by."""

    name: str
    of: str
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    pointers: Mapping[str, str] = field(default_factory=dict)


def variants(target: str) -> Iterator[Variant]:
    """What is shipped for a target: every configuration, both half precisions, both widths, both axes, groups."""
    for dtype in ("fp16", "bf16"):
        for config in shipped("wna16", target):
            yield _weight_only("wna16", 4, config, dtype, target)
    for config in shipped("wna16_gemv", target):
        yield _weight_only("wna16_gemv", 4, config, "fp16", target)
    yield _weight_only("wna16", 2, shipped("wna16", target)[0], "fp16", target)
    yield _weight_only("wna16", 4, shipped("wna16", target)[0], "fp16", target, symmetric=True)
    for config in shipped("wna16_narrow", target):
        yield _weight_only("wna16", 4, config, "fp16", target, group=64)
    for config in shipped("wna16_ic", target):
        yield _weight_only("wna16", 4, config, "fp16", target, axis="ic")
    for config in shipped("wna8", target):
        yield _integer(4, config, 0, target)
    for config in shipped("wna8_grouped", target):
        for group in (64, 128):
            yield _integer(4, config, group, target)
    yield _integer(4, shipped("wna8", target)[-1], 0, target, bias=True)  # where the sums take most registers
    yield _integer(4, shipped("wna8_grouped", target)[-1], 128, target, bias=True)
    for bits in (2, 8):
        yield _integer(bits, shipped("wna8", target)[0], 0, target)
    yield _integer(2, shipped("wna8_grouped", target)[0], 32, target)
    for bits, group in ((4, 0), (8, 0), (8, 128)):
        constants = {"BITS": bits, "SYMMETRIC": False, "GROUP": group, "BM": 1, "CHUNK": 2048}
        name = f"act_quant a{bits}" + (f" g{group}" if group else "")
        yield Variant(name, "act_quant", constants, {"num_warps": 8}, {"codes": "*i8", **_ROWS})
    for dtype in ("fp16", "bf16"):
        yield from _rotations(dtype, target)


def _rotations(dtype: str, target: str) -> Iterator[Variant]:
    """All that DuQuant does to an input, with codes and without, and the first half of it for long rows."""
    rotation = {"B": 128, "HAS_SMOOTH": True, "WIDEN": False}
    pointers = dict.fromkeys(("x", "y", "smooth", "first", "second", "middle"), f"*{dtype}")
    whole = {**rotation, "PERMUTES": True, "ROTATES_TWICE": True, "BITS": 4, "SYMMETRIC": False, "GROUP": 0}
    for config in shipped("rotate", target):
        blocks = {"BM": config.block_m, "CHUNK": config.block_n}
        for family, quantizes in (("rotate_quantize", True), ("rotate", False)):
            yield Variant(
                f"{family} {dtype} {config.block_m}x{config.block_n}", "rotate_quantize",
                {**whole, **blocks, "QUANTIZES": quantizes}, config.options, {**pointers, "codes": "*i8", **_ROWS},
            )  # fmt: skip
    yield Variant(
        f"rotate_permute {dtype} 16x128", "rotate_permute", {**rotation, "BM": 16}, {"num_warps": 4}, pointers
    )


_ROWS = {"scales": "*fp32", "zeros": "*i32"}


def compiled(variant: Variant, target: str) -> Binary:
    """Compile for a target and read what came out. Raises HarnessError where Triton is missing or interpreting."""
    return _read(translated(variant, target), target)


def translated(variant: Variant, target: str) -> Any:
    """Triton's own result; ``asm`` holds every stage, from ``ttir`` to ``ptx``. Raises as :func:`compiled`."""
    load_triton()
    source = _function(variant.of)
    names: list[str] = source.arg_names
    signature = {name: "constexpr" if name in variant.constants else _type(name, variant) for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in _DIVISIBLE]
    return _translate(source, signature, variant.constants, aligned, target, variant.options)


def build(
    source: Any, signature: Mapping[str, str], constants: Mapping[str, Any], aligned: Collection[str], target: str,
    options: Mapping[str, int],
) -> Binary:  # fmt: skip
    """Any Triton function. ``signature``: Triton's type by argument; ``aligned``: those that 16 divides; ``options``:
    num_warps and whatever else the compiler of the target knows."""
    return _read(_translate(source, signature, constants, aligned, target, options), target)


def _translate(
    source: Any, signature: Mapping[str, str], constants: Mapping[str, Any], aligned: Collection[str], target: str,
    options: Mapping[str, int],
) -> Any:  # fmt: skip
    triton = load_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = source.arg_names
    hardware = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(source, dict(signature), dict(constants), divisible),
        target=hardware,
        options=dict(options),
    )


def _read(result: Any, target: str) -> Binary:
    if target.startswith("gfx"):
        return read_amd(result.asm["amdgcn"], result.metadata.shared)
    tool = Path(load_triton().__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return read_nvidia(result.asm["cubin"], result.asm["ptx"], result.metadata.shared, tool)


def _weight_only(
    kernel: Kernel, bits: int, config: Config, dtype: str, target: str,
    *, axis: str = "oc", group: int = 128, symmetric: bool = False,
) -> Variant:  # fmt: skip
    constants = {
        "BITS": bits, "GROUP": group, "PER_INPUT": axis == "ic", "ASYMMETRIC": not symmetric, "HAS_BIAS": False,
        "EVEN_K": True, "WIDEN": False, "PTX": not target.startswith("gfx"), "BM": config.block_m, "BN": config.block_n,
    }  # fmt: skip
    kind = axis + (f" g{group}" if group != 128 else "") + (" sym" if symmetric else "")
    name = f"{kernel} w{bits} {dtype} {kind} {config.block_m}x{config.block_n}"
    pointers = dict.fromkeys(("x", "bias", "y"), f"*{dtype}")
    limited = config if dtype == "fp16" else config.unlimited
    return Variant(name, kernel, constants, limited.options, pointers)


def _integer(bits: int, config: Config, group: int, target: str, *, bias: bool = False) -> Variant:
    constants = {
        "BITS": bits, "GROUP": group, "ASYMMETRIC": True, "HAS_BIAS": bias, "PTX": not target.startswith("gfx"),
        "BM": config.block_m, "BN": config.block_n,
    }  # fmt: skip
    kind = (f"g{group}" if group else "channel") + (" bias" if bias else "")
    name = f"wna8 w{bits} {kind} {config.block_m}x{config.block_n}"
    return Variant(name, "wna8", constants, config.options, {"x": "*i8", "qweight": "*i8", "zeros": "*u8"})


def _type(name: str, variant: Variant) -> str:
    if name in variant.pointers:
        return variant.pointers[name]
    if name in _POINTERS:
        return _POINTERS[name]
    if name in ("x", "y", "bias"):
        return "*fp16"
    return "fp32" if name == "clip" else "i32"


def _function(family: str) -> Any:
    from harness.kernels.gpu.act_quant import act_quant_kernel
    from harness.kernels.gpu.rotate import rotate_permute_kernel, rotate_quantize_kernel
    from harness.kernels.gpu.wna8 import wna8_kernel
    from harness.kernels.gpu.wna16 import wna16_kernel
    from harness.kernels.gpu.wna16_gemv import wna16_gemv_kernel

    functions: dict[str, Callable[..., Any]] = {
        "wna16": wna16_kernel, "wna16_gemv": wna16_gemv_kernel, "wna8": wna8_kernel, "act_quant": act_quant_kernel,
        "rotate_quantize": rotate_quantize_kernel, "rotate_permute": rotate_permute_kernel,
    }  # fmt: skip
    return functions[family]


def load_triton() -> Any:
    """Triton, told to compile. Raises HarnessError where it is missing or interpreting."""
    if os.environ.get("TRITON_INTERPRET"):
        raise HarnessError("TRITON_INTERPRET is set: kernels are interpreted, not compiled", fix="unset it")
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default is about to change, and results depend on it
    try:
        import triton
    except ImportError:
        raise HarnessError("triton is not installed", fix="pip install triton (Linux)") from None
    return triton
