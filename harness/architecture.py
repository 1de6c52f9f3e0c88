"""Find a model's decoder blocks, their linear layers, and which linears share an input, from the model itself.

Nothing here knows an architecture by name: one forward pass over a few tokens shows in which order the linears run
and which of them are given the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.errors import Unsupported

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Block:
    """One decoder block. Names are full module names, in order of execution."""

    name: str
    shared_inputs: tuple[tuple[str, ...], ...]
    """Linears grouped by the tensor they read: in Llama (q, k, v), (o,), (gate, up), (down,)."""
    attentions: tuple[str, ...]
    """Modules that compute attention scores."""
    returns_tuple: bool

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.shared_inputs for name in group)


@dataclass(frozen=True)
class Architecture:
    blocks: tuple[Block, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for block in self.blocks for name in block.linears)

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        return tuple(group for block in self.blocks for group in block.shared_inputs)


@dataclass
class _Trace:
    """What one forward pass showed of a block."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # kept alive, so that identity means identity
    versions: dict[str, int] = field(default_factory=dict)
    returns_tuple: bool = False


def discover(model: PreTrainedModel) -> Architecture:
    """The architecture of ``model``.

    Raises Unsupported, naming the culprit, for models without repeated blocks of ``nn.Linear`` layers, and for blocks
    that keep weights elsewhere (fused experts, transposed layers) or have linears that a token may not reach.
    """
    names = block_names(model)
    modules = dict(model.named_modules())
    traces = {name: _Trace() for name in names}
    hooks = [hook for name in names for hook in _watch(name, modules[name], traces[name])]
    try:
        with torch.inference_mode():
            model(input_ids=torch.arange(_PROBE_TOKENS, device=model.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Architecture(tuple(_block(name, modules[name], traces[name]) for name in names))


def block_names(model: PreTrainedModel) -> list[str]:
    """The module list that holds most of the parameters in linears, its members of one class."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            if weights and (best is None or weights > best[0]):
                best = (weights, name, module)
    if best is None:
        raise Unsupported(
            f"no repeated decoder blocks with nn.Linear layers in {type(model).__name__}",
            fix="quantization works on decoder-only transformers built of nn.Linear",
        )
    return [f"{best[1]}.{i}" for i in range(len(best[2]))]


def _watch(name: str, block: nn.Module, trace: _Trace) -> list[Any]:
    def record(linear: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            trace.inputs[linear], trace.versions[linear] = args[0], _version(args[0])

        return hook

    def output(module: nn.Module, args: Any, result: Any) -> None:
        trace.returns_tuple = isinstance(result, tuple)

    hooks: list[Any] = [block.register_forward_hook(output)]
    for child, module in block.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(record(f"{name}.{child}")))
    return hooks


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _block(name: str, block: nn.Module, trace: _Trace) -> Block:
    _refuse_hidden_weights(name, block, trace)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for linear, x in trace.inputs.items():
        # Reshaped views of one tensor are one input: compare where the data lies, not the Python object.
        key = (x.data_ptr(), x.numel(), x.shape[-1], trace.versions[linear])
        groups.setdefault(key, []).append(linear)
    attentions = tuple(f"{name}.{child}" for child, module in block.named_modules() if _is_attention(module))
    return Block(name, tuple(tuple(group) for group in groups.values()), attentions, trace.returns_tuple)


def _is_attention(module: nn.Module) -> bool:
    """Attention modules of transformers carry the flag that its attention functions read."""
    return hasattr(module, "is_causal") and any(isinstance(child, nn.Linear) for child in module.children())


def _refuse_hidden_weights(name: str, block: nn.Module, trace: _Trace) -> None:
    linears = {f"{name}.{child}" for child, m in block.named_modules() if isinstance(m, nn.Linear)}
    for missed in sorted(linears - trace.inputs.keys()):
        raise Unsupported(f"{missed} is not reached by every token", fix="mixtures of experts are not supported yet")
    known = {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}
    for parameter, value in block.named_parameters():
        if value.ndim >= 2 and f"{name}.{parameter}" not in known:
            raise Unsupported(
                f"{name}.{parameter} {list(value.shape)} is a weight outside nn.Linear",
                fix="only blocks whose matrices are all nn.Linear can be quantized",
            )
