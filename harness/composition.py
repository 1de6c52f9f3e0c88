"""Chain two stages: transform the inputs of the linears, then let any method round the transformed weights.

The second stage is not told. It is handed the window with the transform pulled out of every linear: what it finds under
a linear's name reads inputs that are transformed already, and holds the weight with the inverse folded in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import nn

from harness.errors import Unsupported
from harness.method import Method, QuantizedWindow
from harness.settings import Setting
from harness.transform import InputTransform
from harness.window import Runner, Window

Transforms = Mapping[tuple[str, ...], InputTransform]


def chain(transforms: Transforms, method: Method, window: Window, setting: Setting) -> QuantizedWindow:
    """What ``method`` makes of ``window`` behind ``transforms``, given by shared input.

    Raises Unsupported where the method divides the inputs by scales of its own, for which there is no place behind a
    rotation.
    """
    by_name = {name: transform for names, transform in transforms.items() for name in names}
    runner = _BehindTransforms(
        dict(window.runner.modules), window.runner.arguments, window.runner.dtype, window.runner.sample, by_name
    )
    folded = {name: _folded(window.linears[name], transform) for name, transform in by_name.items()}
    with runner.replaced(folded):
        part = method.quantize(replace(window, runner=replace(runner, modules={**runner.modules, **folded})), setting)
    linears = dict(part.linears)
    for names, transform in transforms.items():
        joined = _joined(transform, part, names)
        for name in names:
            linears[name] = replace(linears[name], transform=joined[id(linears[name].transform)])
    return replace(part, linears=linears)


@dataclass(frozen=True)
class _BehindTransforms(Runner):
    """Whatever stands in for a linear reads transformed inputs."""

    transforms: Mapping[str, InputTransform] = field(default_factory=dict)

    @contextmanager
    def replaced(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        inner = {
            name: _Behind(self.transforms[name], module) if name in self.transforms else module
            for name, module in modules.items()
        }
        with super().replaced(inner):
            yield


class _Behind(nn.Module):
    def __init__(self, transform: InputTransform, module: nn.Module) -> None:
        super().__init__()
        self.transform, self.module = transform, module

    def forward(self, x: Float[torch.Tensor, "*rows in"]) -> Float[torch.Tensor, "*rows out"]:
        output: torch.Tensor = self.module(self.transform.apply(x))
        return output


def _folded(linear: nn.Linear, transform: InputTransform) -> nn.Linear:
    """The linear that gives, for transformed inputs, what ``linear`` gives for plain ones."""
    folded = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    folded.weight = nn.Parameter(transform.fold(linear.weight.float()).to(linear.weight.dtype), requires_grad=False)
    if linear.bias is not None:
        folded.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return folded.eval()


def _joined(first: InputTransform, part: QuantizedWindow, names: tuple[str, ...]) -> dict[int, InputTransform]:
    """``first`` followed by what the second stage does to the input, one object for each of the second stage's."""
    joined: dict[int, InputTransform] = {}
    for second in (part.linears[name].transform for name in names):
        if second is None:
            joined[id(second)] = first
        elif second.smooth is None:
            joined.setdefault(id(second), InputTransform(first.smooth, (*first.steps, *second.steps)))
        else:
            raise Unsupported(
                "the second stage smooths inputs that are rotated already", fix="switch its smoothing off"
            )
    return joined
