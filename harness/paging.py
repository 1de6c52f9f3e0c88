"""Where the weights of decoder blocks are: in memory all the time, or only while the block is needed.

A paged model is read from its checkpoint block by block. Quantization holds the blocks of a window; evaluation lets
many forward passes wait at a block, reads it, and lets them go on to the next: a block is read once for all of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import PreTrainedModel

from harness.architecture import Architecture, Block
from harness.attention import allow_quantized_attention
from harness.placement import TOKENS_AT_ONCE
from harness.quantized import QuantizedModel
from harness.quantizedfile import QuantizedFile
from harness.simulation import scored
from harness.standins import standing_in

T = TypeVar("T")
Watch = Callable[[int, int], None]


class Weights(Protocol):
    """Keeps a model's block weights where they have to be."""

    def holding(self, blocks: Iterable[str]) -> AbstractContextManager[None]:
        """Within, the weights of ``blocks`` are in memory."""

    def run(self, passes: Sequence[Callable[[], T]], watch: Watch) -> Iterator[T]:
        """The results of forward passes, in their order; weights are read once for many of them.

        Each is given out as soon as it is there, so that not all have to be in memory. ``watch`` is told (steps done,
        of how many).
        """

    def quantize(self, file: QuantizedFile, architecture: Architecture) -> None:
        """From here on the layers in ``file`` compute instead of the model's own."""


class InMemory:
    """All blocks are in memory all the time."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._module = module

    def holding(self, blocks: Iterable[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, passes: Sequence[Callable[[], T]], watch: Watch) -> Iterator[T]:
        watch(0, len(passes))
        for done, forward in enumerate(passes, 1):
            yield forward()
            watch(done, len(passes))

    def quantize(self, file: QuantizedFile, architecture: Architecture) -> None:
        for block in architecture.blocks:  # one after the other: codes take a quarter of what they stand for
            QuantizedModel().joined(file.part([f"{block.name}."])).install(self._module, architecture)


class Paged:
    """Blocks are read when they are entered, and dropped when nobody holds them any more."""

    def __init__(
        self,
        module: PreTrainedModel,
        blocks: Sequence[str],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        """``read`` gives a parameter of ``module`` by its name; those of ``blocks`` are on the meta device."""
        self._module, self._read = module, read
        self._modules: Mapping[str, nn.Module] = dict(module.named_modules())
        self._order = {name: i for i, name in enumerate(blocks)}
        self._users: Counter[str] = Counter()
        self._held: dict[str, ExitStack] = {}
        self._quantized: tuple[QuantizedFile, dict[str, Block]] | None = None
        for name in blocks:
            block = self._modules[name]
            block.forward = partial(self._forward, name, block.forward)

    @contextmanager
    def holding(self, blocks: Iterable[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in blocks:
                stack.enter_context(self._holding(name))
            yield

    def quantize(self, file: QuantizedFile, architecture: Architecture) -> None:
        self._quantized = file, {block.name: block for block in architecture.blocks}

    def run(self, passes: Sequence[Callable[[], T]], watch: Watch) -> Iterator[T]:
        waiting, most = deque(passes), TOKENS_AT_ONCE[self._module.device.type]
        steps, done = len(passes) * len(self._order), 0
        while waiting:
            under_way: list[_Pass] = []
            try:
                while waiting and sum(forward.tokens for forward in under_way) < most:
                    under_way.append(_Pass(waiting.popleft()))
                    under_way[-1].advance()
                for block in self._order:
                    with self.holding([block]):
                        for forward in under_way:
                            watch(done, steps)
                            if forward.waits_for != block:
                                raise RuntimeError(f"a forward pass came to {forward.waits_for}, not to {block}")
                            forward.advance()
                            done += 1
                            if forward.dead:
                                yield forward.result()
            finally:
                for forward in under_way:
                    forward.stop()
        watch(steps, steps)

    def _forward(self, name: str, forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if isinstance(current, _Pass):
            current.wait_for(name, hidden)
        with self._holding(name):
            return forward(hidden, *args, **kwargs)

    @contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        if not self._users[name]:
            self._held[name] = self._fetched(name)
        self._users[name] += 1
        try:
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                self._held.pop(name).close()

    def _fetched(self, block: str) -> ExitStack:
        """The weights of ``block`` in place; closing it drops them."""
        with ExitStack() as stack:
            stood_in_for: set[str] = set()
            if self._quantized is not None:
                stood_in_for = {
                    f"{name}.{kind}" for name in self._quantized[1][block].linears for kind in ("weight", "bias")
                }
            for name, _ in self._modules[block].named_parameters(prefix=block):
                if name not in stood_in_for:
                    stack.enter_context(self._present(name))
            if self._quantized is not None:
                file, blocks = self._quantized
                part = file.part([f"{block}."]).on(self._module.device)
                if part.attention:
                    allow_quantized_attention(self._module)
                stack.enter_context(standing_in(self._modules, part, [blocks[block]], self._module.dtype, scored))
            return stack.pop_all()

    @contextmanager
    def _present(self, name: str) -> Iterator[None]:
        owner, _, leaf = name.rpartition(".")
        parameters = self._modules[owner]._parameters
        placeholder = parameters[leaf]
        parameters[leaf] = nn.Parameter(self._read(name), requires_grad=False)
        try:
            yield
        finally:
            parameters[leaf] = placeholder


class _Pass(greenlet):  # type: ignore[misc]
    """A forward pass that waits at the entrance of every block until it is let go on."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        super().__init__(forward)
        self._result = None
        self.waits_for: str | None = None
        self.tokens = 0
        """Whose hidden states wait."""

    def advance(self) -> None:
        """To the next block, or to the end."""
        self._result = self.switch()

    def result(self) -> Any:
        """What the pass came to; it is not kept."""
        result, self._result = self._result, None
        return result

    def wait_for(self, block: str, hidden: torch.Tensor) -> None:
        """Called from within the pass."""
        self.waits_for, self.tokens = block, hidden.shape[:-1].numel()
        self.parent.switch()

    def stop(self) -> None:
        """Unwind it, if it has not ended."""
        if self and not self.dead:
            self.throw()
