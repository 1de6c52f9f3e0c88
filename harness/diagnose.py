"""Which layer went wrong, found out once something has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import nn


class _Found(Exception):
    """Carries the name of the culprit out of the forward pass."""


def first_not_finite(model: nn.Module, ids: Int[torch.Tensor, "n length"]) -> str | None:
    """The first module, in order of execution, that turns ``ids`` into NaN or infinity; None if none does."""

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
            raise _Found(name)

    with ExitStack() as stack, torch.inference_mode():
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                hook: Callable[..., None] = partial(look, name)
                stack.callback(module.register_forward_hook(hook).remove)
        try:
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
        except _Found as found:
            return str(found)
    return None
