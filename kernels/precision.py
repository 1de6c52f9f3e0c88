"""Which operator or kernel does a layer's product, and in which type: watched, and held against what its path declares.

On a CPU an operator of torch's that is given another type than it is meant for falls back to slow loops without a word;
anywhere, a path could quietly multiply what it has dequantized. Either shows here, before anything is scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import BadOutput
from harness.kernels import watching
from harness.kernels.paths import Product

if TYPE_CHECKING:
    from harness.kernels.execute import KernelLinear

_PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_int_mm", "_weight_int4pack_mm", "_weight_int8pack_mm",
    "_weight_int4pack_mm_for_cpu", "qlinear_pointwise",
)  # fmt: skip
_PREPARATIONS = ("act_quant", "rotate_quantize", "rotate_permute", "encode_tokens")
"""Kernels in front of a product. Any other that is started counts as one."""


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[Product]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.split("::")[1] in _PRODUCTS:
            activations = next(value for value in args if isinstance(value, torch.Tensor) and value.ndim > 1)
            self.seen.append(Product(name, activations.dtype))
        return func(*args, **(kwargs or {}))


@contextmanager
def watched_products() -> Iterator[list[Product]]:
    """The products that are done within, by torch's operators, by our own kernels and by Triton's, as they come."""
    seen: list[Product] = []

    def started(kernel: str, dtypes: tuple[torch.dtype, ...]) -> None:
        if kernel not in _PREPARATIONS:
            seen.append(Product(kernel, dtypes[0]))

    with _Operators(seen), watching.watched_by(started):
        yield seen


def check_precision(modules: Mapping[str, KernelLinear], inputs: Iterable[int], dtype: torch.dtype) -> dict[str, int]:
    """Run every layer on rows of ones and see what does its product, in which type; counts by both, in words.

    ``inputs``: numbers of rows to try; ``dtype``: the model's. Raises BadOutput, naming the layer, where it is not
    what the path declares.
    """
    counts: Counter[str] = Counter()
    for name, module in modules.items():
        layer = module.path.layer
        for rows in inputs:
            declared = module.path.product(rows, dtype)
            with watched_products() as seen:
                module.path(torch.ones(rows, layer.in_features, dtype=dtype, device=layer.qweight.device))
            if seen != [declared]:
                ran = " and ".join(map(_words, seen)) or "no product that can be watched"
                raise BadOutput(f"{name} declares {_words(declared)}, and ran {ran}", fix="this is a fault of harness")
            counts[f"{module.path.operator(rows)}; given {_short(declared.given)}"] += 1
    return dict(counts)


def _words(product: Product) -> str:
    return f"{product.operator} on {_short(product.given)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
