"""What a packed layer runs by: paths, one for each layer, and the kernels of a device, which have a path for any."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float

from harness.kernels.pack import PackedLinear

Rows = Float[torch.Tensor, "rows in"]
Products = Float[torch.Tensor, "rows out"]


class Product(NamedTuple):
    """A matrix product: the operator or kernel that does it, and the type that its activations are given in."""

    operator: str
    given: torch.dtype


class Path(ABC):
    """A layer, ready to run on rows of any floating type. Its product is done in two steps, so that paths of one kind
    which read alike share the first."""

    layer: PackedLinear

    @property
    def reads(self) -> Hashable:
        """What :meth:`given` depends on beside the rows."""
        return None

    @abstractmethod
    def operator(self, rows: int) -> str:
        """What runs for so many rows, in words."""

    @abstractmethod
    def product(self, rows: int, dtype: torch.dtype) -> Product:
        """The one product that is done for so many rows of a model of type ``dtype``."""

    def given(self, x: Rows) -> Any:
        """What the product is given of ``x``, transformed already: its codes, or itself."""
        return x

    @abstractmethod
    def multiply(self, given: Any, dtype: torch.dtype) -> Products:
        """The product, in ``dtype``, that of the input."""

    def __call__(self, x: Rows) -> Products:
        """Both steps."""
        return self.multiply(self.given(x), x.dtype)


@runtime_checkable
class Kernels(Protocol):
    """The paths of a device."""

    def path(self, layer: PackedLinear) -> Path:
        """How ``layer``, on the device, is run. Raises Unsupported where nothing runs it."""

    def preparing(self, path: Path) -> Callable[[Rows], Any]:
        """What makes of an input that is not transformed yet what the product of ``path`` is given."""
