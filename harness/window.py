"""What a method sees: some blocks of the model, and the calibration text as it looks where they begin.

Two streams of hidden states run through the model: the full-precision one, and the quantized one, which has passed
through the blocks that are quantized already. Both are kept as chunks of a fixed number of tokens, so that neither a
batch size nor the order of cells can change a method's integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import nn
from transformers import PreTrainedModel

from harness.architecture import Architecture, Block
from harness.attention import set_spec
from harness.method import QuantizedWindow
from harness.simulation import simulate

CHUNK_TOKENS = 2048

Observer = Callable[[Float[torch.Tensor, "tokens in"]], None]


@dataclass
class InputStatistics:
    """Streamed over the calibration tokens that reach one shared input."""

    hessian: Float[torch.Tensor, "in in"]
    """Σ x xᵀ in float32, not normalised."""
    absmax: Float[torch.Tensor, " in"]
    """max |x| of each channel."""
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device) -> InputStatistics:
        return cls(torch.zeros(features, features, device=device), torch.zeros(features, device=device))

    def add(self, x: Float[torch.Tensor, "tokens in"]) -> None:
        x = x.float()
        self.hessian.addmm_(x.T, x)
        torch.maximum(self.absmax, x.abs().amax(dim=0), out=self.absmax)
        self.tokens += x.shape[0]


@dataclass(frozen=True)
class Stream:
    """Hidden states at the start of a window, in chunks [sequences, length, hidden]."""

    chunks: list[Float[torch.Tensor, "n t hidden"]]


@dataclass(frozen=True)
class Runner:
    """Runs single blocks of a model with the arguments that the model itself would give them."""

    modules: Mapping[str, nn.Module]
    arguments: Mapping[str, dict[str, Any]]
    dtype: torch.dtype

    def block(self, block: Block, hidden: Float[torch.Tensor, "n t hidden"]) -> Float[torch.Tensor, "n t hidden"]:
        output = self.modules[block.name](hidden, **self.arguments[block.name])
        hidden = output[0] if block.returns_tuple else output
        return hidden

    @contextmanager
    def installed(self, part: QuantizedWindow, blocks: Iterable[Block]) -> Iterator[None]:
        """Within, the linears, norms and attention of ``part`` stand in for the model's own."""
        shared = [group for block in blocks for group in block.shared_inputs]
        with ExitStack() as stack:
            for name, module in simulate(part.linears, shared, self.dtype).items():
                stack.enter_context(self._replaced(name, module))
            for name, value in part.norms.items():
                stack.enter_context(self._revalued(name, value))
            for name, spec in part.attention.items():
                set_spec(self.modules[name], spec)
                stack.callback(set_spec, self.modules[name], None)
            yield

    @contextmanager
    def _replaced(self, name: str, module: nn.Module) -> Iterator[None]:
        parent_name, _, child = name.rpartition(".")
        parent = self.modules[parent_name]
        original = getattr(parent, child)
        setattr(parent, child, module)
        try:
            yield
        finally:
            setattr(parent, child, original)

    @contextmanager
    def _revalued(self, name: str, value: torch.Tensor) -> Iterator[None]:
        owner, _, child = name.rpartition(".")
        parameter = getattr(self.modules[owner], child)
        original = parameter.data
        parameter.data = value.to(original)
        try:
            yield
        finally:
            parameter.data = original


@dataclass(frozen=True)
class Window:
    """Consecutive decoder blocks, to be quantized together. Nothing in it may be changed."""

    index: int
    blocks: tuple[Block, ...]
    runner: Runner
    seed: int
    progress: Callable[[str], None]
    """Say what is being done, for the progress bar."""
    _full_precision: Stream | None = None
    _quantized: Stream | None = None

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The full-precision linears by full module name, in order of execution."""
        return {name: self.runner.modules[name] for block in self.blocks for name in block.linears}  # type: ignore[misc]

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Names of linears, grouped by the input they read, in order of execution."""
        return tuple(group for block in self.blocks for group in block.shared_inputs)

    @property
    def full_precision(self) -> Stream:
        """The calibration text as the untouched model brings it here."""
        return _given(self._full_precision)

    @property
    def quantized(self) -> Stream:
        """The calibration text as it arrives through the blocks quantized so far."""
        return _given(self._quantized)

    def forward(
        self, hidden: Float[torch.Tensor, "n t hidden"], part: QuantizedWindow | None = None
    ) -> Float[torch.Tensor, "n t hidden"]:
        """The window's output for ``hidden``, with ``part`` standing in for its linears where given."""
        with self.runner.installed(part or QuantizedWindow({}), self.blocks):
            for block in self.blocks:
                hidden = self.runner.block(block, hidden)
        return hidden

    def observe(
        self, observers: Mapping[str, Observer], stream: Stream, part: QuantizedWindow | None = None
    ) -> None:
        """Call ``observers[linear]`` with the input of that linear, [tokens, in], for every chunk of ``stream``.

        Linears in ``part`` are quantized meanwhile. Each chunk is run no further than the last observer needs.
        """
        for chunk in stream.chunks:
            waiting = set(observers)

            def hook(name: str) -> Callable[..., None]:
                def served(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                    observers[name](args[0].flatten(0, -2))
                    waiting.discard(name)  # noqa: B023 (used within this iteration only)
                    if not waiting:  # noqa: B023
                        raise _AllServed

                return served

            with self.runner.installed(part or QuantizedWindow({}), self.blocks), ExitStack() as stack:
                for name in observers:
                    parent, _, child = name.rpartition(".")
                    module = getattr(self.runner.modules[parent], child)
                    stack.callback(module.register_forward_pre_hook(hook(name)).remove)
                try:
                    for block in self.blocks:
                        chunk = self.runner.block(block, chunk)
                except _AllServed:
                    continue

    def input_statistics(
        self, stream: Stream, groups: Iterable[tuple[str, ...]] | None = None, part: QuantizedWindow | None = None
    ) -> dict[tuple[str, ...], InputStatistics]:
        """Hessian and absolute maxima of each shared input, in one pass over ``stream``."""
        statistics = {
            group: InputStatistics.empty(self.linears[group[0]].in_features, self.linears[group[0]].weight.device)
            for group in (groups or self.shared_inputs)
        }
        self.observe({group[0]: s.add for group, s in statistics.items()}, stream, part)
        return statistics


class _AllServed(Exception):
    """Every observer has seen this chunk; the rest of the blocks need not run."""


def _given(stream: Stream | None) -> Stream:
    if stream is None:
        raise RuntimeError("a method with calibrated = False has no calibration streams")
    return stream


def relative_error(weight: Float[torch.Tensor, "out in"], approximation: Float[torch.Tensor, "out in"]) -> float:
    """‖W − Ŵ‖² / ‖W‖²."""
    weight = weight.float()
    return float((weight - approximation).square().sum() / weight.square().sum().clamp(min=1e-30))


@dataclass
class Streams:
    """Both streams, moved through the model window by window."""

    runner: Runner
    full_precision: Stream
    quantized: Stream

    def advance(self, blocks: Sequence[Block], part: QuantizedWindow) -> None:
        """Push both streams through ``blocks``: as they are, and as ``part`` leaves them."""
        self.full_precision = self._through(blocks, self.full_precision)
        with self.runner.installed(part, blocks):
            self.quantized = self._through(blocks, self.quantized)

    def _through(self, blocks: Sequence[Block], stream: Stream) -> Stream:
        chunks = []
        for chunk in stream.chunks:
            for block in blocks:
                chunk = self.runner.block(block, chunk)
            chunks.append(chunk)
        return Stream(chunks)


@dataclass
class _Capture:
    hidden: list[torch.Tensor] = field(default_factory=list)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)


def open_streams(
    model: PreTrainedModel, architecture: Architecture, calibration: Int64[torch.Tensor, "n length"]
) -> Streams:
    """Both streams at the first block: the embedded calibration text, and each block's own arguments.

    The model runs with every block replaced by one that hands its input on, which costs the embedding alone.
    """
    per_chunk = max(1, CHUNK_TOKENS // calibration.shape[1])
    modules = dict(model.named_modules())
    capture = _Capture()
    with ExitStack() as stack:
        for block in architecture.blocks:
            stack.enter_context(_handing_on(block, modules[block.name], capture, first=block is architecture.blocks[0]))
        # One sequence first: arguments made for a batch of one broadcast to any batch.
        model(input_ids=calibration[:1], use_cache=False)
        arguments = dict(capture.arguments)
        capture.hidden.clear()
        for chunk in calibration.split(per_chunk):
            model(input_ids=chunk, use_cache=False)
    stream = Stream(capture.hidden)
    return Streams(Runner(modules, arguments, model.dtype), stream, stream)


@contextmanager
def _handing_on(block: Block, module: nn.Module, capture: _Capture, *, first: bool) -> Iterator[None]:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        if args:
            raise RuntimeError(f"{block.name} takes positional arguments beside its input")
        capture.arguments[block.name] = kwargs
        if first:
            capture.hidden.append(hidden_states)
        return (hidden_states,) if block.returns_tuple else hidden_states

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
