"""What a method must leave as it found it, looked at before and after each window."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.method import Method, QuantizedWindow, StreamName
from harness.settings import Setting
from harness.window import Window

# What Python itself adds to a class when it is first looked at.
_OF_PYTHON = ("__dict__", "__weakref__", "__annotations__", "__annotations_cache__", "__doc__", "_abc_impl")


@dataclass
class Traces:
    """What was not as before, in words; empty where all is well."""

    model: list[str] = field(default_factory=list)
    calibration: list[str] = field(default_factory=list)
    process: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Watched:
    """A method that is looked over the shoulder."""

    method: Method
    traces: Traces = field(default_factory=Traces)
    stop_at: int | None = None
    """Raise :class:`Stopped` before this window."""

    @property
    def size(self) -> int:
        return self.method.size

    @property
    def stride(self) -> int:
        return self.method.stride

    @property
    def reads(self) -> frozenset[StreamName]:
        return self.method.reads

    def supports(self, setting: Setting) -> str | None:
        return self.method.supports(setting)

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        if window.index == self.stop_at:
            raise Stopped
        before = _blocks(window), _streams(window), self._process()
        part = self.method.quantize(window, setting)
        after = _blocks(window), _streams(window), self._process()
        found = (self.traces.model, self.traces.calibration, self.traces.process)
        for old, new, words in zip(before, after, found, strict=True):
            words += [f"{change} in window {window.index}" for change in changes(old, new)]
        return part

    def _process(self) -> dict[str, Any]:
        own = type(self.method).__module__.partition(".")[0]
        return process_state() | module_state("harness", own, "torch.nn.functional")


class Stopped(Exception):
    """The walk was ended on purpose, as a killed process would end it."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """The keys that are new, gone or of another value."""
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            yield f"{key} is gone"
        elif key not in before:
            yield f"{key} is new"
        elif before[key] != after[key]:
            yield f"{key} changed"


def model_state(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Everything about a model that a forward pass depends on, in a form that can be compared."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(prefix=prefix):
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state[f"module {name!r}"] = (id(module), module.training, hooks, module.__dict__.get("forward"))
    for name, parameter in model.named_parameters(prefix=prefix):
        state[name] = (parameter.dtype, parameter.requires_grad, _fingerprint(parameter))
    for name, buffer in model.named_buffers(prefix=prefix):
        state[f"buffer {name}"] = (buffer.dtype, _fingerprint(buffer))
    return state


def process_state() -> dict[str, Any]:
    """What of this process outlives a window and is not the method's to change.

    Drawing from torch's own generator is no change: the driver seeds it for each window. Seeding it anew is.
    """
    return {
        "the state of Python's random": hash(random.getstate()),
        "the state of numpy's global random": hash(str(np.random.get_state(legacy=False))),
        "the seed of torch's generator": torch.initial_seed(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
        "TF32 in cuda.matmul": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in cudnn": torch.backends.cudnn.allow_tf32,
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradient mode": torch.is_grad_enabled(),
        "the working folder": os.getcwd(),
        **{f"environment variable {name}": value for name, value in os.environ.items()},
    }


def module_state(*packages: str) -> dict[str, Any]:
    """What the modules of ``packages`` hold: where a method would keep something, or replace code that scores it.

    A function behind ``functools.cache`` is the same function whatever it has cached.
    """
    return {
        f"{module.__name__}.{name}": _held(value, module.__name__)
        for module in list(sys.modules.values())
        if any(f"{module.__name__}.".startswith(f"{package}.") for package in packages)
        for name, value in vars(module).items()
        if not name.startswith("__") and not isinstance(value, ModuleType)
    }


def _held(value: object, module: str) -> object:
    """``value`` in a form to compare later: the contents of containers and classes, else which object it is."""
    match value:
        case torch.Tensor():
            return _fingerprint(value)
        case str() | int() | float() | bytes() | None:
            return value
        case Mapping():
            return [(key, _held(one, module)) for key, one in value.items()]
        case list() | tuple() | set() | frozenset():
            return [_held(one, module) for one in value]
        case type() if value.__module__ == module:
            members = {name: one for name, one in vars(value).items() if name not in _OF_PYTHON}
            return [(name, id(one) if callable(one) else _held(one, "")) for name, one in members.items()]
    return id(value)


def _blocks(window: Window) -> dict[str, Any]:
    """The window's own blocks; the rest of a large model is looked at before and after the walk."""
    state: dict[str, Any] = {}
    for block in window.blocks:
        state |= model_state(window.runner.modules[block.name], block.name)
    return state


def _streams(window: Window) -> dict[str, Any]:
    return {
        f"chunk {i} of the {name} stream": _fingerprint(chunk)
        for name, stream in window._streams.items()
        for i, chunk in enumerate(stream.chunks)
    }


def _fingerprint(tensor: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """The shape, and a hash of the bits weighted by their place."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64)
    places = torch.arange(1, 2 * len(words), 2, device=words.device)  # odd: each change of a word changes the sum
    return tuple(tensor.shape), int((words * places).sum())
