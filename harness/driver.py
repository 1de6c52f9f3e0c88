"""Walk a model window by window and let a method quantize each; stop and resume between any two windows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64

from harness.architecture import Block
from harness.attention import AttentionSpec, allow_quantized_attention
from harness.errors import BadOutput, HarnessError, Unsupported
from harness.linear import QuantizedLinear
from harness.method import Method, QuantizedWindow
from harness.models import LoadedModel
from harness.processes import give_back_freed_memory
from harness.progress import Progress
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec
from harness.settings import Setting
from harness.spill import SpilledTensors
from harness.terms import attention_faults, linear_faults
from harness.window import Runner, Streams, Window, open_streams
from harness.windowfiles import WindowFiles

_STAGE = "quantize"


def quantize_model(
    model: LoadedModel,
    method: Method,
    setting: Setting,
    calibration: Int64[torch.Tensor, "n length"] | None,
    *,
    seed: int,
    checkpoints: Path,
    progress: Progress,
) -> QuantizedModel:
    """All windows of :func:`quantize_to_files` in memory."""
    return quantize_to_files(
        model, method, setting, calibration, seed=seed, checkpoints=checkpoints, progress=progress
    ).joined()


def quantize_to_files(
    model: LoadedModel,
    method: Method,
    setting: Setting,
    calibration: Int64[torch.Tensor, "n length"] | None,
    *,
    seed: int,
    checkpoints: Path,
    progress: Progress,
    spill: Path | None = None,
) -> WindowFiles:
    """Quantize every linear of ``model``, which itself is left as it was.

    Each finished window is written to ``checkpoints``; windows found there are not computed again, and the result is
    bit-equal to that of an uninterrupted walk. Of a paged model only the blocks of a window are in memory; ``spill`` is
    a folder for the streams, which otherwise are too. Raises Unsupported for a setting the method cannot do, BadOutput,
    naming the layer, when a result holds NaN or is not what the contract asks for.
    """
    if reason := method.supports(setting):
        raise Unsupported(reason)
    blocks = model.architecture.blocks
    with torch.no_grad(), _highest_precision(), torch.random.fork_rng(_accelerators(model)):
        if setting.quantizes_kv:
            allow_quantized_attention(model.module)
        streams = _open_streams(model, method, calibration, spill)
        runner = streams.runner if streams else Runner(dict(model.module.named_modules()), {}, model.module.dtype)
        files, carried = WindowFiles(checkpoints), dict[str, torch.Tensor]()
        for index, (members, leaving) in enumerate(windows(blocks, method.size, method.stride)):
            progress(_STAGE, index * method.stride, len(blocks), members[0].name)
            window = Window(
                index,
                tuple(members),
                runner,
                seed,
                partial(progress, _STAGE, index * method.stride, len(blocks)),
                dict(streams.streams) if streams else {},
                _plain_attention(members, setting),
                partial(streams.full_precision_behind, members) if streams else None,
                tuple(leaving),
                carried,
            )
            with model.weights.holding(block.name for block in members):
                finished = files.load(index)
                part = (
                    finished.on(model.device) if finished else _quantize_window(window, leaving, method, setting, files)
                )
                carried = dict(part.state)
                if streams and members[-1] is not blocks[-1]:
                    streams.advance(leaving, part)
            give_back_freed_memory()  # in pieces that the next window's tensors may not fit into
        progress(_STAGE, len(blocks), len(blocks))
    return files


def windows(blocks: Sequence[Block], size: int, stride: int) -> Iterator[tuple[Sequence[Block], Sequence[Block]]]:
    """Each window's blocks, and those of them that leave it finished. The last window takes all that is left."""
    start = 0
    while True:
        members = blocks[start : start + size]
        last = start + size >= len(blocks)
        yield members, members if last else members[:stride]
        if last:
            return
        start += stride


def _open_streams(
    model: LoadedModel, method: Method, calibration: Int64[torch.Tensor, "n length"] | None, spill: Path | None
) -> Streams | None:
    if not method.reads:
        return None
    if calibration is None:
        raise HarnessError("this method needs calibration data", fix="give some: --calibration pydoc:32x512")
    keep = list if spill is None else partial(SpilledTensors, folder=spill)
    return open_streams(model.module, model.architecture, calibration.to(model.device), method.reads, keep)


def _quantize_window(
    window: Window, leaving: Sequence[Block], method: Method, setting: Setting, files: WindowFiles
) -> QuantizedWindow:
    start = time.monotonic()
    # Each window has a random state of its own, so that a resumed walk draws what an uninterrupted one does.
    torch.manual_seed(window.seed * 1_000_003 + window.index)
    _refuse_not_finite(window)
    try:
        part = method.quantize(window, setting)
    except BadOutput as error:
        raise BadOutput(error.what, where=error.where or _names(window), fix=error.fix) from error
    part = _only(part, window, leaving, setting)
    seconds = time.monotonic() - start
    part = replace(part, report=tuple({"window_seconds": seconds, **row} for row in part.report))
    files.save(window.index, part)
    return part


def _refuse_not_finite(window: Window) -> None:
    for name, linear in window.linears.items():
        # What is not finite spoils the sum, which reads the weight once; that it overflows is seen at a second look.
        if not torch.isfinite(linear.weight.sum()) and not torch.isfinite(linear.weight).all():
            raise BadOutput(
                f"the weight of {name} holds NaN or infinity", fix="the checkpoint is damaged: fetch it again"
            )


def _names(window: Window) -> str:
    return ", ".join(block.name for block in window.blocks)


def _only(part: QuantizedWindow, window: Window, leaving: Sequence[Block], setting: Setting) -> QuantizedWindow:
    """The blocks that leave the window, checked: all linears there, as the setting asks, all numbers finite."""
    finished = [name for block in leaving for name in block.linears]  # in order, so that the first fault is named
    for name in finished:
        if name not in part.linears:
            raise BadOutput(f"{name} was not quantized", fix="a method returns every linear of its window")
        _refuse_another_type(name, part.linears[name])
        try:
            replace(part.linears[name])  # checked once more as it is now: its tensors can have been changed since
        except BadOutput as error:
            raise BadOutput(f"{name}: {error.what}", fix=error.fix) from error
        expected, got = tuple(window.linears[name].weight.shape), tuple(part.linears[name].codes.shape)
        if got != expected:
            raise BadOutput(f"{name} has codes of shape {list(got)}, not {list(expected)}")
        _refuse(name, linear_faults(part.linears[name], setting), setting)
    for name, value in part.norms.items():
        if value.ndim != 1 or not torch.isfinite(value).all():
            raise BadOutput(f"{name} was replaced by something that is not a finite vector")
        _refuse_another_vector(name, value, window)
    attention = {**window.attention, **part.attention}
    attention = {name: attention[name] for block in leaving for name in block.attentions if name in attention}
    for name, spec in attention.items():
        _refuse(name, attention_faults(spec, setting, window.runner.modules[name]), setting)
    prefixes = tuple(f"{block.name}." for block in leaving)
    return QuantizedWindow(
        {name: part.linears[name] for block in leaving for name in block.linears},
        {name: value for name, value in part.norms.items() if name.startswith(prefixes)},
        attention,
        tuple(row for row in part.report if row["layer"] in finished),
        part.outputs if len(leaving) == len(window.blocks) else {},
        part.state,
    )


def _refuse(name: str, faults: Iterable[str], setting: Setting) -> None:
    for fault in faults:
        raise BadOutput(f"{name} has {fault} at {setting}", fix="name in `supports` what the method cannot do")


def _refuse_another_vector(name: str, value: torch.Tensor, window: Window) -> None:
    owner, _, child = name.rpartition(".")
    there = getattr(window.runner.modules.get(owner), child, None)
    if not isinstance(there, torch.Tensor) or there.shape != value.shape:
        was = f"of shape {list(there.shape)}" if isinstance(there, torch.Tensor) else "no parameter of the model"
        raise BadOutput(f"norms: {name} is {was}, and was replaced by {len(value)} numbers")


def _refuse_another_type(name: str, linear: object) -> None:
    """A subclass could run other weights than its integers stand for."""
    if type(linear) is not QuantizedLinear:
        raise BadOutput(
            f"{name} is a {type(linear).__name__}, not a QuantizedLinear", fix="return codes, scales and zero points"
        )


def _accelerators(model: LoadedModel) -> list[torch.device]:
    """Devices whose random state is the caller's, beside the CPU's."""
    return [model.device] if model.device.type == "cuda" else []


def _plain_attention(blocks: Sequence[Block], setting: Setting) -> dict[str, AttentionSpec]:
    if not setting.quantizes_kv:
        return {}
    plain = AttentionSpec(ActivationSpec(setting.kv_bits, setting.symmetric))
    return {name: plain for block in blocks for name in block.attentions}


class _highest_precision:
    """float32 products are float32 within: TF32 would decide codes."""

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *exception: object) -> None:
        torch.set_float32_matmul_precision(self._before)
