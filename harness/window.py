"""What a method sees: some blocks of the model, and the calibration text as it looks where they begin.

Streams of hidden states run through the model: the full-precision one, and the quantized one, which has passed through
the blocks that are quantized already. They are kept as chunks of a fixed number of tokens, so that neither a batch size
nor the order of cells can change a method's integers. A third one is a single sequence: it begins as the mean of all
the embedded ones, position by position, and passes through the quantized blocks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Float, Int64
from torch import nn
from transformers import PreTrainedModel

from harness.architecture import Architecture, Block
from harness.attention import AttentionSpec
from harness.hessian import Hessian
from harness.linear import QuantizedLinear
from harness.method import QuantizedWindow, StreamName
from harness.quantizer import ActivationSpec, simulate_tokens
from harness.simulation import simulate
from harness.standins import forward_of, replaced, standing_in
from harness.transform import InputTransform

CHUNK_TOKENS = 2048
SAMPLE_TOKENS = 16
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stream:
    """Hidden states at the start of a window, in chunks [sequences, length, hidden]."""

    chunks: Sequence[Float[torch.Tensor, "_n t hidden"]]


Keep = Callable[[Iterable[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes chunks as they are computed, and keeps them in memory or elsewhere."""


@dataclass(frozen=True)
class Sample:
    """A few embedded tokens, and what each block is called with beside them: enough to try something out."""

    hidden: Float[torch.Tensor, "1 t hidden"]
    arguments: Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Runner:
    """Runs single blocks of a model with the arguments that the model itself would give them."""

    modules: Mapping[str, nn.Module]
    arguments: Mapping[str, dict[str, Any]]
    dtype: torch.dtype
    sample: Sample | None = None

    @property
    def on_sample(self) -> Runner:
        """The runner of ``sample``, which is shorter than the sequences of the streams."""
        if self.sample is None:
            raise RuntimeError("the method reads no stream, so there are no hidden states to run")
        return replace(self, arguments=self.sample.arguments)

    def block(self, block: Block, hidden: Float[torch.Tensor, "_n _t _h"]) -> Float[torch.Tensor, "_n _t _h"]:
        """The block's output for ``hidden``. (Shapes are not compared: walks have several calls under way at once.)"""
        output = self.modules[block.name](hidden, **self.arguments[block.name])
        return output[0] if block.returns_tuple else output  # type: ignore[no-any-return]

    def installed(self, part: QuantizedWindow, blocks: Iterable[Block]) -> AbstractContextManager[None]:
        """Within, the linears, norms and attention of ``part`` stand in for the model's own."""
        return standing_in(self.modules, part, blocks, self.dtype, simulate)

    def replaced(self, modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Within, ``modules`` stand in for the model's own of those names."""
        return replaced(self.modules, modules)


@dataclass(frozen=True)
class Window:
    """Consecutive decoder blocks, to be quantized together. Nothing in it may be changed."""

    index: int
    blocks: tuple[Block, ...]
    runner: Runner
    seed: int
    progress: Callable[[str], None]
    """Say what is being done, for the progress bar."""
    _streams: Mapping[StreamName, Stream] = field(default_factory=dict)
    attention: Mapping[str, AttentionSpec] = field(default_factory=dict)
    """How the setting quantizes keys and values, by attention module; empty where it does not."""
    _full_precision_outputs: Callable[[], Stream] | None = None
    leaving: tuple[Block, ...] = ()
    """The blocks that leave finished: the first of the window, all of the last one."""
    carried: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The ``state`` that the window before handed on (:class:`harness.method.QuantizedWindow`)."""

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The full-precision linears by full module name, in order of execution."""
        return {name: self.runner.modules[name] for block in self.blocks for name in block.linears}  # type: ignore[misc]

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Names of linears, grouped by the input they read, in order of execution."""
        return tuple(group for block in self.blocks for group in block.shared_inputs)

    @property
    def staying(self) -> tuple[str, ...]:
        """Names of the linears that the next window sees too."""
        return tuple(name for block in self.blocks if block not in self.leaving for name in block.linears)

    @property
    def full_precision(self) -> Stream:
        """The calibration text as the untouched model brings it here."""
        return self.stream("full_precision")

    @property
    def full_precision_outputs(self) -> Stream:
        """The calibration text as the untouched model brings it to the end of the window.

        Each block of the model runs once for it, however much windows overlap, and the walk goes on with the result.
        """
        self.stream("full_precision")  # refuses where the method does not read it
        assert self._full_precision_outputs is not None
        return self._full_precision_outputs()

    @property
    def quantized(self) -> Stream:
        """The calibration text as it arrives through the blocks quantized so far."""
        return self.stream("quantized")

    @property
    def mean(self) -> Stream:
        """One sequence, the mean of the embedded calibration text, as it arrives through the quantized blocks."""
        return self.stream("mean")

    def stream(self, name: StreamName) -> Stream:
        """One of those that the method declares to read."""
        if name not in self._streams:
            raise RuntimeError(f"the method does not declare that it reads the {name} stream")
        return self._streams[name]

    def forward(
        self, hidden: Float[torch.Tensor, "n t hidden"], part: QuantizedWindow | None = None
    ) -> Float[torch.Tensor, "n t hidden"]:
        """The window's output for ``hidden``, with ``part`` standing in for its linears where given."""
        with self.runner.installed(part or QuantizedWindow({}), self.blocks):
            return self.forward_through(hidden, {})

    def forward_through(
        self, hidden: Float[torch.Tensor, "n t hidden"], modules: Mapping[str, nn.Module]
    ) -> Float[torch.Tensor, "n t hidden"]:
        """The window's output for ``hidden``, with ``modules`` standing in for those of its own of these names."""
        with self.runner.replaced(modules):
            for block in self.blocks:
                hidden = self.runner.block(block, hidden)
        return hidden

    def walk(
        self, *streams: Stream, attention: Mapping[str, AttentionSpec] | None = None
    ) -> Iterator[tuple[SharedInput, ...]]:
        """Run the window once over all of ``streams``, stopping at one shared input after another.

        At each stop the caller sees, per stream, the input of some linears for every chunk, and may put quantized
        linears in their place before the run goes on: what comes later has then seen their error. Nothing is computed
        twice. The last stop has ``names == ()`` and, for ``chunks``, the window's output. Keys and values are quantized
        as ``attention`` says, or as the setting does, except in the full-precision stream.
        """
        attention = self.attention if attention is None else attention
        untouched = self._streams.get("full_precision")
        walkers = [_Walker(self, stream, {} if stream is untouched else attention) for stream in streams]
        with ExitStack() as stack:
            for name, linear in self.linears.items():
                stack.enter_context(forward_of(linear, partial(_gate, name, linear.forward)))
            for walker in walkers:
                stack.callback(walker.stop)
            for names in (*self.shared_inputs, ()):
                yield tuple(walker.advance(names) for walker in walkers)

    @contextmanager
    def calls_of(self, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
        """Within, the arguments with which walks call the modules ``names`` are kept, one entry for each chunk."""
        calls: dict[str, list[Call]] = {name: [] for name in names}

        def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if isinstance(getcurrent(), _Forward):
                calls[name].append((args, kwargs))

        with ExitStack() as stack:
            for name in calls:
                hook = self.runner.modules[name].register_forward_pre_hook(partial(note, name), with_kwargs=True)
                stack.callback(hook.remove)
            yield calls


@dataclass(frozen=True)
class SharedInput:
    """A stop of :meth:`Window.walk`: the linears ``names`` are about to read ``chunks``, [n, t, in] each."""

    names: tuple[str, ...]
    chunks: list[Float[torch.Tensor, "_n _t _in"]]
    _runner: Runner
    _stand_ins: dict[str, nn.Module]

    def install(self, linears: Mapping[str, QuantizedLinear]) -> None:
        """From here on ``linears`` run instead of the full-precision ones."""
        self._stand_ins.update(simulate(linears, [self.names], self._runner.dtype))

    def hessian(self, activation: ActivationSpec | None = None, transform: InputTransform | None = None) -> Hessian:
        """Of all chunks, transformed and quantized as a linear with these would."""
        return Hessian.of(self.tokens(activation, transform), where=", ".join(self.names) or None)

    def absmax(self) -> Float[torch.Tensor, " in"]:
        """max |x| of each channel over all tokens."""
        return torch.stack([x.abs().amax(dim=0) for x in self.tokens()]).amax(dim=0)

    def tokens(
        self, activation: ActivationSpec | None = None, transform: InputTransform | None = None
    ) -> Iterator[Float[torch.Tensor, "tokens in"]]:
        """The chunks as rows of tokens, transformed and quantized as a linear with these would."""
        for chunk in self.chunks:
            x = chunk.flatten(0, -2)
            x = x if transform is None else transform.apply(x)
            yield x if activation is None else simulate_tokens(x, activation)


class _Walker:
    """One stream on its walk: each chunk's forward pass is a greenlet that switches back here at every gate."""

    def __init__(self, window: Window, stream: Stream, attention: Mapping[str, AttentionSpec]) -> None:
        self.window, self.attention = window, attention
        self.firsts = {group[0] for group in window.shared_inputs}
        self.stand_ins: dict[str, nn.Module] = {}
        self.forwards = [_Forward(self, stream, i) for i in range(len(stream.chunks))]

    def advance(self, names: tuple[str, ...]) -> SharedInput:
        """Run every chunk to the shared input ``names``, or to the end."""
        with self.window.runner.installed(QuantizedWindow({}, attention=self.attention), ()):
            arrivals = [forward.switch() for forward in self.forwards]
        expected = names[0] if names else ""
        if any(name != expected for name, _ in arrivals):
            raise RuntimeError(f"linears ran in another order: {arrivals[0][0]!r} came where {expected!r} was due")
        # Some architectures flatten sequences and tokens before some linears.
        chunks = [
            x.unflatten(0, forward.shape) if x.ndim == 2 else x
            for forward, (_, x) in zip(self.forwards, arrivals, strict=True)
        ]
        return SharedInput(names, chunks, self.window.runner, self.stand_ins)

    def stop(self) -> None:
        """Unwind the passes that have not ended."""
        for forward in self.forwards:
            if forward:
                forward.throw()
        self.forwards.clear()  # they hold their walker: a cycle that would keep hidden states until it is collected


class _Forward(greenlet):  # type: ignore[misc]
    """A forward pass of one chunk through a window."""

    def __init__(self, walker: _Walker, stream: Stream, index: int) -> None:
        super().__init__()
        self.walker, self.stream, self.index = walker, stream, index
        self.shape = torch.Size()

    def run(self) -> tuple[str, torch.Tensor]:
        chunk = self.stream.chunks[self.index]
        self.shape = chunk.shape[:2]
        for block in self.walker.window.blocks:
            chunk = self.walker.window.runner.block(block, chunk)
        return "", chunk


def _gate(name: str, plain: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Stands before a linear: reports its input if it is the first to read it, then runs what stands in for it."""
    forward = getcurrent()
    if not isinstance(forward, _Forward):
        return plain(x)
    if name in forward.walker.firsts:
        forward.parent.switch((name, x))
    stand_in = forward.walker.stand_ins.get(name)
    return plain(x) if stand_in is None else stand_in(x)


def relative_error(weight: Float[torch.Tensor, "out in"], approximation: Float[torch.Tensor, "out in"]) -> float:
    """‖W − Ŵ‖² / ‖W‖²."""
    weight = weight.float()
    return float(torch.dist(weight, approximation).square() / weight.norm().square().clamp(min=1e-30))


@dataclass
class Streams:
    """The streams, moved through the model window by window."""

    runner: Runner
    streams: dict[StreamName, Stream]
    keep: Keep = list
    _ahead: dict[str, Stream] = field(default_factory=dict)  # the full-precision stream behind blocks already run

    def full_precision_behind(self, blocks: Sequence[Block]) -> Stream:
        """The full-precision stream behind ``blocks``, which begin where the streams are."""
        stream = self.streams["full_precision"]
        for block in blocks:
            if block.name not in self._ahead:
                self._ahead[block.name] = self._through([block], stream)
            stream = self._ahead[block.name]
        return stream

    def advance(self, blocks: Sequence[Block], part: QuantizedWindow) -> None:
        """Push the full-precision stream through ``blocks`` as they are, the others as ``part`` leaves them."""
        for name, stream in self.streams.items():
            if name in part.outputs:
                self.streams[name] = Stream(self.keep(part.outputs[name].chunks))
            elif name == "full_precision":
                self.streams[name] = self.full_precision_behind(blocks)
            else:
                with self.runner.installed(part, blocks):
                    self.streams[name] = self._through(blocks, stream)
        for block in blocks:
            self._ahead.pop(block.name, None)

    def _through(self, blocks: Sequence[Block], stream: Stream) -> Stream:
        def passed(chunk: torch.Tensor) -> torch.Tensor:
            for block in blocks:
                chunk = self.runner.block(block, chunk)
            return chunk

        return Stream(self.keep(passed(chunk) for chunk in stream.chunks))


@dataclass
class _Capture:
    hidden: torch.Tensor | None = None
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def embed(self, model: PreTrainedModel, ids: Int64[torch.Tensor, "n length"]) -> Float[torch.Tensor, "n length h"]:
        """What reaches the first block for ``ids``."""
        model.base_model(input_ids=ids, use_cache=False)  # without the output head
        assert self.hidden is not None
        return self.hidden


def open_streams(
    model: PreTrainedModel,
    architecture: Architecture,
    calibration: Int64[torch.Tensor, "n length"],
    reads: frozenset[StreamName] = frozenset({"full_precision", "quantized"}),
    keep: Keep = list,
) -> Streams:
    """The streams ``reads`` at the first block: the embedded calibration text, and each block's own arguments.

    The model runs with every block replaced by one that hands its input on, which costs the embedding alone.
    """
    per_chunk = max(1, CHUNK_TOKENS // calibration.shape[1])
    modules = dict(model.named_modules())
    capture = _Capture()
    with ExitStack() as stack:
        for block in architecture.blocks:
            stack.enter_context(_handing_on(block, modules[block.name], capture, first=block is architecture.blocks[0]))
        sample = Sample(capture.embed(model, calibration[:1, :SAMPLE_TOKENS]), dict(capture.arguments))
        # One sequence alone: arguments made for a batch of one broadcast to any batch.
        capture.embed(model, calibration[:1])
        arguments = dict(capture.arguments)
        chunks = keep(capture.embed(model, chunk) for chunk in calibration.split(per_chunk))
    streams: dict[StreamName, Stream] = {"full_precision": Stream(chunks), "quantized": Stream(chunks)}
    streams = {name: stream for name, stream in streams.items() if name in reads}
    if "mean" in reads:
        mean = torch.stack([chunk.sum(dim=0, keepdim=True, dtype=torch.float32) for chunk in chunks]).sum(dim=0)
        streams["mean"] = Stream([(mean / len(calibration)).to(model.dtype)])
    return Streams(Runner(modules, arguments, model.dtype, sample), streams, keep)


@contextmanager
def _handing_on(block: Block, module: nn.Module, capture: _Capture, *, first: bool) -> Iterator[None]:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        if args:
            raise RuntimeError(f"{block.name} takes positional arguments beside its input")
        capture.arguments[block.name] = kwargs
        if first:
            capture.hidden = hidden_states
        return (hidden_states,) if block.returns_tuple else hidden_states

    with forward_of(module, forward):
        yield
