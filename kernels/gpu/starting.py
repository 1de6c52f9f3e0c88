"""Where kernels are started, so that who wants to know which run, and on what, can watch. Needs no Triton by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Watcher = Callable[[str, tuple[torch.dtype, ...]], None]
"""Told a kernel's name, and the types of the tensors that it is given, in order."""
_watchers: list[Watcher] = []


def start(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """Launch a Triton kernel. ``constants``: its constants, and Triton's own options."""
    for watcher in _watchers:
        watcher(_name(kernel), tuple(value.dtype for value in operands if isinstance(value, torch.Tensor)))
    kernel[grid](*operands, **constants)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within, ``watcher`` is told of every kernel before it is launched."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _name(kernel: Any) -> str:
    """``wna16`` for ``wna16_kernel``."""
    return str(kernel.fn.__name__).removesuffix("_kernel")
