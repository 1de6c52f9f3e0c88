"""Tensors that wait in a file instead of in memory."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import torch


class TensorFile:
    """Bytes of tensors in a file without a name: it is gone with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the object)
        weakref.finalize(self, self._file.close)
        self._end = 0

    def append(self, tensor: torch.Tensor) -> int:
        """Write ``tensor`` behind all others; the result is where. Raises OSError when the disk is full."""
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        self.write(start, tensor)
        return start

    def write(self, start: int, tensor: torch.Tensor) -> None:
        """Write ``tensor`` in place of what lies at ``start``."""
        whole = tensor.detach().cpu().contiguous()  # in a variable: a view does not keep it alive
        view = _bytes_of(whole)
        while view:
            written = os.pwrite(self._file.fileno(), view, start)
            start, view = start + written, view[written:]

    def read(self, start: int, target: torch.Tensor) -> None:
        """Fill ``target``, which is contiguous and in main memory, from ``start`` on."""
        view = _bytes_of(target)
        while view:
            got = os.preadv(self._file.fileno(), [view], start)
            if not got:
                raise OSError("a spilled tensor is cut off")
            start, view = start + got, view[got:]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its memory. (An array of numpy would pin the tensor's storage, which then could not be taken.)"""
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


class SpilledTensors(Sequence[torch.Tensor]):
    """Tensors in a file; looking one up reads it."""

    def __init__(self, tensors: Iterable[torch.Tensor], folder: Path) -> None:
        self._file = TensorFile(folder)
        self._places = [(self._file.append(t), t.shape, t.dtype, t.device) for t in tensors]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, shape, dtype, device = self._places[index]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.read(start, tensor)
        return tensor.to(device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))
