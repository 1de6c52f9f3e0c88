"""What a packed layer runs by: paths, one for each layer, and the kernels of a device, which have a path for any."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float

from harness.kernels.pack import PackedLinear

Rows = Float[torch.Tensor, "rows in"]
Products = Float[torch.Tensor, "rows out"]


class Product(NamedTuple):
    """A matrix product: the operator or kernel that does it, and the type that its activations are given in."""

    operator: str
    given: torch.dtype


@runtime_checkable
class Path(Protocol):
    """A layer, ready to run."""

    @property
    def layer(self) -> PackedLinear: ...

    def operator(self, rows: int) -> str:
        """What runs for so many rows, in words."""

    def product(self, rows: int, dtype: torch.dtype) -> Product:
        """The one product that is done for so many rows of a model of type ``dtype``."""

    def __call__(self, x: Rows) -> Products:
        """``x``: transformed already, of any floating type; the result has its type."""


@runtime_checkable
class Kernels(Protocol):
    """The paths of a device."""

    def path(self, layer: PackedLinear) -> Path:
        """How ``layer``, on the device, is run. Raises Unsupported where nothing runs it."""

    def transform(self, x: Rows, layer: PackedLinear) -> Rows:
        """``x`` after the online transform that ``layer`` has, in the type of ``x``."""
