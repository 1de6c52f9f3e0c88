"""Minimise ‖(W − Ŵ) X‖² over the codes of a weight: the arithmetic that GPTQ and its descendants share.

The weight is handled transposed, each column of the layer lying in one piece of memory, and in the order in which the
columns are rounded. With H⁻¹ = UᵀU, rounding column j leaves the error e_j = (w_j − ŵ_j) / U_jj, and every later column
k gives up e_j · U_jk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8

from harness.errors import BadOutput
from harness.hessian import Hessian
from harness.method import Report
from harness.quantizer import (
    SCALE_DTYPE,
    Grid,
    decode,
    grid_of_ranges,
    grid_of_rows,
    range_of_rows,
)

_STRIDE = 16  # columns that look back one by one; what lies behind is updated by a product of matrices
_DAMP_STEP = 0.01
_FLOORS = tuple(10.0**k * 1e-6 for k in range(6))


@dataclass(frozen=True)
class Factorization:
    """A damped Hessian that has a Cholesky factor, and what it took to get there."""

    hessian: Float[torch.Tensor, "in in"]
    """Σ x xᵀ with damping, ones on the diagonal of dead columns."""
    diagonal: Float[torch.Tensor, " in"]
    """Of the Hessian before damping."""
    dead: torch.Tensor
    """[in], True where no token has a value."""
    tokens: int
    damp: float
    floor: float = 0.0
    fallback: bool = False
    """Nothing made it positive definite: the layer is to be rounded to nearest."""

    def without_dead(self, weight: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        """``weight`` with zeros in the columns that are never used."""
        return weight.masked_fill(self.dead, 0) if self.dead.any() else weight

    def factor(self, order: Int64[torch.Tensor, " in"]) -> Float[torch.Tensor, "in in"]:
        """U, upper triangular, with H⁻¹ = UᵀU for the Hessian in that order; each row divided by its diagonal entry.

        Flipping both axes turns the Cholesky factor into H = R Rᵀ with R upper, and then U = R⁻¹: no inverse of H. Of a
        wide layer one such matrix takes half a gigabyte, so none is kept longer than it must.
        """
        backwards = order.flip(0)
        flipped = self.hessian[backwards][:, backwards]
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if failed:  # in the order of the inputs it was, by rounding alone
            raise BadOutput("the Hessian is all but singular: its factorization fails in one order", fix="raise damp")
        del flipped
        inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        inverse.div_(inverse.diagonal().clone()[:, None])
        return inverse.flip(0, 1)

    def error(self, difference: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, " out"]:
        """diag(ΔW H ΔWᵀ) / tokens for the damped H: the mean squared output error of each row, and its damping."""
        return ((difference @ self.hessian) * difference).sum(dim=1) / self.tokens

    def report(self) -> Report:
        return {
            "tokens": self.tokens,
            "dead_columns": int(self.dead.sum()),
            "damp_used": self.damp,
            "floor": self.floor,
            "fallback": self.fallback,
        }


def factorize(hessian: Hessian, damp: float, *, where: str, allow_rtn_fallback: bool) -> Factorization:
    """Damp ``hessian`` until it is positive definite: λ, λ + 0.01, … below 1, then floors under the diagonal.

    Raises BadOutput, naming the layer, when nothing helps, unless ``allow_rtn_fallback``.
    """
    matrix = hessian.matrix.clone()
    diagonal = matrix.diagonal().clone()
    dead = diagonal == 0
    matrix.diagonal()[dead] = 1  # as in the authors' code; it counts in the mean, as one of any unit
    mean = float(matrix.diagonal().mean())

    def attempt(damp: float, floor: float) -> Factorization | None:
        damped = matrix.clone()
        damped.diagonal().add_(damp * mean).clamp_(min=floor * float(diagonal.abs().max()))
        _, failed = torch.linalg.cholesky_ex(damped)
        return None if failed else Factorization(damped, diagonal, dead, hessian.tokens, damp, floor)

    steps = max(1, math.ceil((1 - damp) / _DAMP_STEP))
    ladder = [(damp + i * _DAMP_STEP, 0.0) for i in range(steps)] + [(damp, floor) for floor in _FLOORS]
    for lam, floor in ladder:
        if found := attempt(lam, floor):
            return found
    if not allow_rtn_fallback:
        raise BadOutput(
            f"{where}: the Hessian is not positive definite at any damping",
            fix="use more calibration tokens, or allow_rtn_fallback=true to round such layers to nearest",
        )
    return Factorization(matrix, diagonal, dead, hessian.tokens, 0.0, 0.0, fallback=True)


def drift(
    weight: Float[torch.Tensor, "out in"],
    tokens: Iterable[Float[torch.Tensor, "_n _in"]],
    reference: Iterable[Float[torch.Tensor, "_n _in"]],
    problem: Factorization,
) -> Float[torch.Tensor, "out in"]:
    """W (X_fp − X) Xᵀ H⁻¹: the change of the weight that best makes up for inputs X that should be X_fp.

    Of all columns at once. Qronos comes to the same once the first column has its code, and GPTAQ corrects each column
    when an earlier one gets its code.
    """
    cross = torch.zeros_like(problem.hessian)
    for x, x_fp in zip(tokens, reference, strict=True):
        cross.addmm_((x_fp.float() - x.float()).T, x.float())
    change: torch.Tensor = torch.linalg.solve(problem.hessian, (weight @ cross).T).T
    return change


@runtime_checkable
class Levels(Protocol):
    """Gives the levels of each column, in the order of rounding."""

    stride: int
    """Columns at whose multiples the updated weight is looked at; 0 if never."""

    def look(self, j: int, columns: Float[torch.Tensor, "in out"]) -> None:
        """Called before column ``j`` is rounded, with all earlier errors worked into ``columns[j:]`` at strides."""

    def of(
        self, j: int, column: Float[torch.Tensor, " out"]
    ) -> tuple[Float[torch.Tensor, " out"], Float[torch.Tensor, " out"], Float[torch.Tensor, " out"]]:
        """Scale, lowest and highest multiple of it, for each weight of column ``j``."""

    def grid(self) -> Grid:
        """The grid in the layer's own order, once all columns are rounded."""


class StaticLevels:
    """One grid of groups along the inputs, known beforehand."""

    stride = 0

    def __init__(self, weight: Float[torch.Tensor, "out in"], plain: Grid, order: Int64[torch.Tensor, " in"]) -> None:
        self.plain = plain
        self.group_of: list[int] = (order // (plain.format.group_size or weight.shape[1])).tolist()
        scales, zeros = plain.scales.float().T.contiguous(), plain.zeros.float().T.contiguous()
        highest = 2**plain.format.bits - 1
        of_group = zip(scales.unbind(), (-zeros).unbind(), (highest - zeros).unbind(), strict=True)
        self.of_group: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = list(of_group)

    def look(self, j: int, columns: Float[torch.Tensor, "in out"]) -> None:
        """Nothing changes a static grid."""

    def of(self, j: int, column: Float[torch.Tensor, " out"]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.of_group[self.group_of[j]]

    def grid(self) -> Grid:
        return self.plain


class FreshLevels:
    """Each group's grid is found in the updated weight when the group is reached; groups are contiguous in order."""

    def __init__(self, weight: Float[torch.Tensor, "out in"], plain: Grid, order: Int64[torch.Tensor, " in"]) -> None:
        self.format = plain.format
        self.stride = plain.format.group_size or weight.shape[1]
        self.group_of = (order // self.stride).tolist()
        self.scales, self.zeros = plain.scales.float(), plain.zeros.float()

    def look(self, j: int, columns: Float[torch.Tensor, "in out"]) -> None:
        if j % self.stride == 0:
            scale, zero = grid_of_rows(columns[j : j + self.stride].T, self.format)
            self.scales[:, self.group_of[j]], self.zeros[:, self.group_of[j]] = scale, zero
            self.now = scale, -zero, 2**self.format.bits - 1 - zero

    def of(self, j: int, column: Float[torch.Tensor, " out"]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.now

    def grid(self) -> Grid:
        return Grid(self.scales.to(SCALE_DTYPE), self.zeros.to(torch.uint8), self.format)


class ColumnLevels:
    """Axis ``ic``: groups lie within a column, so that its grid is found in the column as it is when rounded.

    Where clipping is searched for, each group keeps the fraction of its range that suits the original weight.
    """

    stride = 0

    def __init__(self, weight: Float[torch.Tensor, "out in"], plain: Grid, order: Int64[torch.Tensor, " in"]) -> None:
        self.format, self.order = plain.format, order.tolist()
        self.size = plain.format.group_size or weight.shape[0]
        self.scales, self.zeros = plain.scales.T.float().contiguous(), plain.zeros.T.float().contiguous()
        lo, hi = range_of_rows(weight.T.reshape(-1, self.size), self.format)
        full, _ = grid_of_ranges(lo, hi, self.format)
        self.kept = (self.scales.flatten() / full).clamp(max=1).reshape(self.scales.shape)

    def look(self, j: int, columns: Float[torch.Tensor, "in out"]) -> None:
        """The column itself is looked at when it is rounded."""

    def of(self, j: int, column: Float[torch.Tensor, " out"]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        i = self.order[j]
        lo, hi = range_of_rows(column.reshape(-1, self.size), self.format)
        scale, zero = grid_of_ranges(lo * self.kept[i], hi * self.kept[i], self.format)
        self.scales[i], self.zeros[i] = scale, zero
        scale, zero = scale.repeat_interleave(self.size), zero.repeat_interleave(self.size)
        return scale, -zero, 2**self.format.bits - 1 - zero

    def grid(self) -> Grid:
        return Grid(self.scales.T.to(SCALE_DTYPE).contiguous(), self.zeros.T.to(torch.uint8).contiguous(), self.format)


def solve_columns(
    weight: Float[torch.Tensor, "out in"],
    factor: Float[torch.Tensor, "in in"],
    order: Int64[torch.Tensor, " in"],
    levels: Levels,
    block_size: int,
    foem_beta: float = 0.0,
) -> UInt8[torch.Tensor, "out in"]:
    """The codes, column after column. Block sizes do not matter to them beyond the order of sums.

    ``foem_beta`` is β of FOEM (Zheng et al., "First-Order Error Matters", AAAI 2026): a column that has drifted by d
    from the original weight while others were rounded has a slope beside its curvature, βdH. At their minimum it has
    given up βd, which it does when its turn comes, and the error that it then leaves is less by as much again.
    """
    codes = _round_columns(weight, factor, order, levels, block_size, foem_beta).to(torch.uint8)
    return codes.index_select(0, order.argsort()).T.contiguous()


@torch.inference_mode()  # what autograd notes down would cost a fifth of operations this small
def _round_columns(
    weight: Float[torch.Tensor, "out in"],
    factor: Float[torch.Tensor, "in in"],
    order: Int64[torch.Tensor, " in"],
    levels: Levels,
    block_size: int,
    foem_beta: float,
) -> Float[torch.Tensor, "in out"]:
    """The codes, as numbers, in the order of rounding.

    A column costs five operations on vectors, so short that looking up their operands one by one would take as long:
    the rows of each tile are taken apart at once. Errors are kept before their division by U_jj, which is in ``owed``.
    """
    size = weight.shape[1]
    columns = weight.T.contiguous().index_select(0, order)
    undrifted = columns.clone() if foem_beta else columns
    owed = factor.T  # row k: what column k gives up to each earlier error
    errors, codes = torch.zeros_like(columns), torch.zeros_like(columns)
    block, stride = _tiling(size, block_size, levels.stride)
    for start in range(0, size, block):
        end = min(start + block, size)
        for first in range(start, end, stride):
            last = min(first + stride, end)
            levels.look(first, columns)
            tile = errors[first:last]
            earlier = tile.T
            lows: list[torch.Tensor] = []
            now = slice(first, last)
            rows = (columns[now], tile, codes[now], owed[now, now].contiguous(), undrifted[now])
            for j, (column, error, code, owes, was) in enumerate(zip(*map(torch.unbind, rows), strict=True), first):
                column.addmv_(earlier, owes, alpha=-1)  # errors of this tile that are not made yet are zero
                if foem_beta:
                    column.lerp_(was, foem_beta)
                scale, low, high = levels.of(j, column)
                torch.div(column, scale, out=code).round_().clamp_(low, high)
                if foem_beta:
                    column.lerp_(was, foem_beta)
                torch.addcmul(column, code, scale, value=-1, out=error)
                lows.append(low)
            codes[first:last] -= torch.stack(lows)
            columns[last:end].addmm_(owed[last:end, first:last], tile, alpha=-1)
        columns[end:].addmm_(owed[end:, start:end], errors[start:end], alpha=-1)
    return codes


def _tiling(size: int, block_size: int, group: int) -> tuple[int, int]:
    """Block and stride such that a group that is to be looked at begins with all errors worked in."""
    if not group:
        return min(block_size, size), _STRIDE
    if group <= block_size:
        return block_size // group * group, math.gcd(_STRIDE, group)
    block = math.gcd(block_size, group)
    return block, math.gcd(_STRIDE, block)


@dataclass(frozen=True)
class Solution:
    """Codes of a (tall) weight on their grid, with the output errors of its rows, of plain rounding too."""

    codes: UInt8[torch.Tensor, "out in"]
    grid: Grid
    error: Float[torch.Tensor, " out"]
    rtn_error: Float[torch.Tensor, " out"]
    kept_rtn: bool = False

    @classmethod
    def rounded(
        cls,
        codes: UInt8[torch.Tensor, "out in"],
        grid: Grid,
        target: Float[torch.Tensor, "out in"],
        problem: Factorization,
    ) -> Solution:
        """Plain rounding."""
        error = problem.error(target - decode(codes, grid))
        return cls(codes, grid, error, error, kept_rtn=True)

    @classmethod
    def solved(
        cls,
        codes: UInt8[torch.Tensor, "out in"],
        grid: Grid,
        target: Float[torch.Tensor, "out in"],
        problem: Factorization,
        rounded: Solution,
    ) -> Solution:
        return cls(codes, grid, problem.error(target - decode(codes, grid)), rounded.error)

    def or_rtn(self, rounded: Solution) -> Solution:
        """Whichever has the lower error, over all rows."""
        return self if float(self.error.sum()) <= float(rounded.error.sum()) else rounded

    def split(self, rows: list[int]) -> Iterator[Solution]:
        """The linears that were stacked."""
        per_group = len(self.codes) // len(self.grid.scales)  # rows that share a scale: 1 on axis oc
        start = 0
        for count in rows:
            part = slice(start, start + count)
            groups = slice(start // per_group, (start + count) // per_group)
            grid = Grid(self.grid.scales[groups], self.grid.zeros[groups], self.grid.format)
            yield Solution(self.codes[part], grid, self.error[part], self.rtn_error[part], self.kept_rtn)
            start += count

    def report(self) -> Report:
        error, rtn = float(self.error.mean()), float(self.rtn_error.mean())
        return {
            "axis": self.grid.format.axis,
            "error": error,
            "rtn_error": rtn,
            "error_ratio": error / rtn if rtn else 1.0,
            "rtn_kept": self.kept_rtn,
        }
