"""Where kernels are started that are no operators of torch's: who wants to know which run, and on what, can watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Watcher = Callable[[str, tuple[torch.dtype, ...]], None]
"""Told a kernel's name, and the types of the tensors that it is given, in order."""
_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


def start(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """Launch a Triton kernel. ``constants``: its constants, and Triton's own options."""
    tell(_name(kernel), *operands)
    kernel[grid](*operands, **constants)


def tell(name: str, *operands: Any) -> None:
    """That a kernel of this name is about to run on ``operands``, the tensors among which are told by their types."""
    for watcher in _WATCHERS.get():
        watcher(name, tuple(value.dtype for value in operands if isinstance(value, torch.Tensor)))


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within, ``watcher`` is told of every kernel before it runs."""
    token = _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def _name(kernel: Any) -> str:
    """``wna16`` for ``wna16_kernel``."""
    return str(kernel.fn.__name__).removesuffix("_kernel")
