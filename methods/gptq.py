"""GPTQ: round column by column, and let the columns not yet rounded make up for each column's error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64

from harness.linear import QuantizedLinear, assemble
from harness.method import QuantizedWindow, Report, StreamName, register
from harness.quantizer import ActivationSpec, Grid, WeightFormat, encode, find_grid
from harness.reconstruction import (
    ColumnLevels,
    Factorization,
    FreshLevels,
    Levels,
    Solution,
    StaticLevels,
    drift,
    factorize,
    solve_columns,
)
from harness.sequential import quantize_in_order
from harness.settings import UNQUANTIZED, Setting
from harness.window import SharedInput, Window


@register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """Minimise each layer's output error column by column, with the Hessian of its inputs.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    Differs from the authors' code: linears that share an input share one Hessian, one factorization and one call;
    inputs come from the quantized layers before, also within a block; a layer whose Hessian cannot be factorized
    ends the cell instead of being rounded to nearest.
    """

    damp: float = 0.01
    """λ: this fraction of the mean diagonal is added to the Hessian's diagonal"""
    block_size: int = 128
    """B: columns between two updates of all the remaining ones"""
    act_order: bool = True
    """columns with the largest diagonal first"""
    static_groups: bool = True
    """grids from the original weight; false: from the updated weight when its group is reached"""
    group_aware: bool = False
    """order columns within groups, and groups by their largest diagonal: fresh grids and contiguous groups"""
    true_sequential: bool = True
    """the inputs of later linears of a block have seen the error of the earlier ones"""
    propagate_error: bool = True
    """the inputs of a block come from the quantized blocks before it"""
    axis: Literal["oc", "ic"] = "oc"
    """groups along the inputs of an output row, or along the outputs of an input column"""
    clip_search: bool | None = None
    """search for the clipping with the least error: true, false, or none for at 2 bits only"""
    qronos_alpha: float = 0.0
    """α: how much of the inputs' drift from the full-precision ones the weight makes up for, 0 to 1. 1 is Qronos, but
    for the code of the first column, which it chooses with the others as they were; GPTAQ's code damps it by 0.25"""
    foem_beta: float = 0.0
    """β of FOEM, 0 to 1: how much of its drift from the original weight (from where ``qronos_alpha`` has moved it) each
    column gives up when it is rounded. As its authors have it in GPTQModel, but for the first column of a block, which
    gives up nothing there; the paper's experiments put H⁻¹ behind β, which depends on the unit of the inputs"""
    best_of_rtn: bool = False
    """keep plain rounding for the layers where its error is lower"""
    allow_rtn_fallback: bool = False
    """round to nearest where no damping makes the Hessian positive definite; otherwise the cell ends"""

    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    workspace: ClassVar[dict[str, Any]] = {
        "weights": 3.0, "squares": 6, "streams": 1, "options": {"qronos_alpha": {"squares": 2, "streams": 1}},
    }  # fmt: skip

    @property
    def reads(self) -> frozenset[StreamName]:
        if not self.propagate_error:
            return frozenset({"full_precision"})
        return frozenset({"quantized", "full_precision"}) if self.qronos_alpha else frozenset({"quantized"})

    def supports(self, setting: Setting) -> str | None:
        if setting.weight_bits == UNQUANTIZED:
            return "gptq quantizes weights: choose W2 to W8"
        if self.act_order and not (self.static_groups or self.group_aware or self.axis == "ic"):
            return "act_order with fresh grids needs a group index at run time: static_groups=true or group_aware=true"
        if self.qronos_alpha and not self.propagate_error:
            return "qronos_alpha makes up for propagated errors: propagate_error=true"
        if self.group_aware and (self.axis == "ic" or not setting.group_size):
            return "group_aware orders groups along the inputs: axis=oc and a setting with groups, or group_aware=false"
        if self.block_size < 1 or self.damp < 0 or not (0 <= self.qronos_alpha <= 1 and 0 <= self.foem_beta <= 1):
            return "block_size from 1, damp from 0, qronos_alpha and foem_beta from 0 to 1"
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        calibration: StreamName = "quantized" if self.propagate_error else "full_precision"
        reference: tuple[StreamName, ...] = ("full_precision",) if self.qronos_alpha else ()
        return quantize_in_order(
            window,
            lambda stop, others: self.quantize_shared(window, stop, others, setting),
            calibration,
            *reference,
            true_sequential=self.true_sequential,
        )

    def quantize_shared(
        self, window: Window, stop: SharedInput, reference: list[SharedInput], setting: Setting
    ) -> tuple[dict[str, QuantizedLinear], list[Report]]:
        """All linears that read one input: one Hessian, one factorization, and, where rows allow it, one call."""
        start = time.monotonic()
        activation = ActivationSpec.of(setting)
        format = WeightFormat.of(setting, self.axis).searched(self.clip_search)
        weights = {name: window.linears[name].weight.float() for name in stop.names}
        problem = factorize(
            stop.hessian(activation), self.damp, where=stop.names[0], allow_rtn_fallback=self.allow_rtn_fallback
        )
        solutions: dict[str, Solution] = {}
        for names in _stacks(weights, format, apart=self.best_of_rtn):
            tall = torch.cat([weights[name] for name in names])
            target = tall
            if reference:
                target = tall + self.qronos_alpha * drift(tall, stop.tokens(activation), reference[0].tokens(), problem)
            parts = self.solve(tall, target, problem, format).split([len(weights[name]) for name in names])
            solutions |= zip(names, parts, strict=True)
        seconds = (time.monotonic() - start) / len(stop.names)
        linears, report = {}, []
        for name, part in solutions.items():
            linears[name] = assemble(part.codes, part.grid, setting, bias=window.linears[name].bias)
            report.append({"layer": name, **part.report(), **problem.report(), "seconds": seconds})
        return linears, report

    def solve(
        self,
        weight: Float[torch.Tensor, "out in"],
        target: Float[torch.Tensor, "out in"],
        problem: Factorization,
        format: WeightFormat,
        plain: Grid | None = None,
    ) -> Solution:
        """Codes whose layer comes closest to ``target``'s outputs.

        ``plain`` is the grid of ``weight`` without its dead columns, if it is known already.
        """
        weight, target = problem.without_dead(weight), problem.without_dead(target)
        plain = plain or find_grid(weight, format)
        rounded = Solution.rounded(encode(weight, plain), plain, target, problem)
        if problem.fallback:
            return rounded
        order = self.order(problem.diagonal, format)
        levels = self.levels(weight, plain, order)
        codes = solve_columns(target, problem.factor(order), order, levels, self.block_size, self.foem_beta)
        solved = Solution.solved(codes, levels.grid(), target, problem, rounded)
        return solved.or_rtn(rounded) if self.best_of_rtn else solved

    def order(self, diagonal: Float[torch.Tensor, " in"], format: WeightFormat) -> Int64[torch.Tensor, " in"]:
        """The order in which columns are rounded. Sorting is stable, so that ties do not depend on the machine."""
        if self.group_aware and format.axis == "oc" and format.group_size:
            groups = diagonal.reshape(-1, format.group_size)
            within = groups.argsort(dim=1, descending=True, stable=True)
            starts = torch.arange(len(groups), device=diagonal.device)[:, None] * format.group_size
            return (within + starts)[groups.amax(dim=1).argsort(descending=True, stable=True)].flatten()
        if self.act_order:
            return diagonal.argsort(descending=True, stable=True)
        return torch.arange(len(diagonal), device=diagonal.device)

    def levels(self, weight: Float[torch.Tensor, "out in"], plain: Grid, order: Int64[torch.Tensor, " in"]) -> Levels:
        """Where the levels of each column come from."""
        if plain.format.axis == "ic":
            return ColumnLevels(weight, plain, order)
        if self.static_groups and not self.group_aware:
            return StaticLevels(weight, plain, order)
        return FreshLevels(weight, plain, order)


def _stacks(weights: Mapping[str, torch.Tensor], format: WeightFormat, *, apart: bool) -> list[tuple[str, ...]]:
    """Linears that are solved as one tall matrix: all, unless they are judged ``apart``, or groups along the outputs
    would run across them."""
    size = format.group_size
    if apart:
        return [(name,) for name in weights]
    if format.axis == "oc" or (size and all(len(weight) % size == 0 for weight in weights.values())):
        return [tuple(weights)]
    return [(name,) for name in weights]
