"""Where the training of a window starts: outliers cut off, a grid for each weight, integers rounded or solved for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import nn

from harness.linear import assemble
from harness.methods.cbq_prepare import Prepared
from harness.methods.cbq_rounding import Kind, RoundedWeight
from harness.methods.cbq_student import UNCLIPPED, LearnedInput, Student
from harness.methods.gptq import GPTQ
from harness.quantizer import ActivationSpec, Grid, WeightFormat, decode, expand, find_grid
from harness.reconstruction import Factorization, factorize
from harness.settings import Setting
from harness.window import Window

Weight = Float[torch.Tensor, "out in"]
INSIDE = 0.45
"""init=gptq: how far, in levels, a weight starts at most from the level that was chosen for it."""


@dataclass(frozen=True)
class Start:
    """How the linears that come into a window begin; the others go on as the window before has left them."""

    kind: Kind
    rank: int
    residual: bool
    damp: float

    def rounded(self, window: Window, prepared: Prepared, setting: Setting) -> Student:
        """At the nearest integers."""
        weights = dict[str, RoundedWeight]()
        for name in window.linears:
            weight = prepared.truncated(name)
            fresh = self.weight(weight, find_grid(weight, WeightFormat.of(setting)))
            weights[name] = carried(window, name, setting) or fresh
        return _student(window, prepared, weights, setting)

    def solved(self, window: Window, prepared: Prepared, setting: Setting) -> Student:
        """At the integers that GPTQ finds, linear after linear."""
        weights = dict[str, RoundedWeight]()
        with window.runner.installed(prepared.surroundings, ()):
            for (stop,) in window.walk(window.quantized, attention=prepared.attention):
                transform = prepared.transforms.get(stop.names)
                started = {name: weight for name in stop.names if (weight := carried(window, name, setting))}
                if stop.names and not started:
                    hessian = stop.hessian(ActivationSpec.of(setting), transform)
                    problem = factorize(hessian, self.damp, where=stop.names[0], allow_rtn_fallback=False)
                    started = self.solve(stop.names, prepared, problem, WeightFormat.of(setting))
                weights |= started
                biases = prepared.smoothed.biases
                stop.install({
                    name: assemble(*weight.hardened(), setting, bias=biases[name], transform=transform)
                    for name, weight in started.items()
                })  # fmt: skip
        return _student(window, prepared, weights, setting)

    def solve(
        self, names: Sequence[str], prepared: Prepared, problem: Factorization, format: WeightFormat
    ) -> dict[str, RoundedWeight]:
        """GPTQ, with grids of the truncated weights. A weight starts between GPTQ's level and the one on its own side,
        close to the other where the two are far apart."""
        originals = [prepared.weights[name] for name in names]
        cut = torch.cat([prepared.truncated(name) for name in names])
        solution = GPTQ().solve(cut, torch.cat(originals), problem, format)
        weights = {}
        parts = solution.split([len(weight) for weight in originals])
        for name, original, part in zip(names, originals, parts, strict=True):
            chosen = decode(part.codes, part.grid)
            reach = INSIDE * expand(part.grid, original.shape)[0]
            weights[name] = self.weight(chosen + torch.clamp(original - chosen, -reach, reach), part.grid)
        return weights

    def weight(self, weight: Weight, grid: Grid) -> RoundedWeight:
        return RoundedWeight.start(weight, grid, self.kind, self.rank, residual=self.residual)


def carried(window: Window, name: str, setting: Setting) -> RoundedWeight | None:
    """What the window before has learned of the linear ``name``."""
    prefix = f"{name}|"
    state = {key.removeprefix(prefix): value for key, value in window.carried.items() if key.startswith(prefix)}
    return RoundedWeight.resumed(state, WeightFormat.of(setting)) if "base" in state else None


def _student(window: Window, prepared: Prepared, weights: Mapping[str, RoundedWeight], setting: Setting) -> Student:
    inputs = []
    for names in window.shared_inputs:
        rho = window.carried.get(f"{names[0]}|rho", torch.tensor(UNCLIPPED))
        rho = nn.Parameter(rho.clone().to(window.linears[names[0]].weight.device))
        inputs.append(LearnedInput(names, ActivationSpec.of(setting), prepared.transforms.get(names), rho))
    return Student(weights, tuple(inputs), prepared.smoothed.biases, prepared.surroundings, setting)
