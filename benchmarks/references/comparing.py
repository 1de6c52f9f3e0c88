"""Compare the codes of a library's GPTQ function with the harness's on the problems of agreement.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

GROUP_SIZE, DAMP = 64, 0.01


@dataclass(frozen=True)
class Problem:
    """A layer, the Hessian of its inputs (Σ x xᵀ), the grid, and what the harness made of them."""

    name: str
    weight: torch.Tensor
    """[out, in], float32; zero in dead columns."""
    hessian: torch.Tensor
    bits: int
    act_order: bool
    scales: torch.Tensor
    """[out, in / g], float32 values that are exact in float16."""
    zeros: torch.Tensor
    codes: torch.Tensor
    """[out, in], uint8."""
    order: torch.Tensor
    """[in]: the column that is rounded first, second, …"""
    positions: torch.Tensor
    """[out, in]: between which levels each weight lies when it is rounded, in float64."""

    def codes_of(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of weights that lie on the grid."""
        scales, zeros = (t.repeat_interleave(GROUP_SIZE, dim=1) for t in (self.scales, self.zeros))
        return (values / scales).round().add(zeros).to(torch.uint8)


def problems(path: Path) -> Iterator[Problem]:
    tensors = load_file(path)
    for key in sorted(key.removesuffix("|codes") for key in tensors if key.endswith("|codes")):
        name, bits, order = key.split("|")
        layer = {part: tensors[f"{name}|{part}"] for part in ("weight", "hessian")}
        parts = {part: tensors[f"{key}|{part}"] for part in ("scales", "zeros", "codes", "order", "positions")}
        yield Problem(name, bits=int(bits), act_order=order == "act-order", **layer, **parts)


def compare(path: Path, quantize: Callable[[Problem], torch.Tensor]) -> None:
    """Print, per problem, the share of equal codes and how near to a tie each row's first difference was."""
    print("| layer | bits | order | equal codes | rows that differ | farthest from a tie, in steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = [_compared(problem, quantize(problem)) for problem in problems(path)]
    equal = sum(one.codes_that_differ == 0 for one in found)
    codes, rows = sum(one.codes_that_differ for one in found), sum(one.rows_that_differ for one in found)
    print(
        f"{equal} of {len(found)} problems equal in every code; {codes} of {sum(one.codes for one in found)} codes and "
        f"{rows} of {sum(one.rows for one in found)} rows differ"
    )


@dataclass(frozen=True)
class Compared:
    codes: int
    codes_that_differ: int
    rows: int
    rows_that_differ: int


def _compared(problem: Problem, codes: torch.Tensor) -> Compared:
    differs = codes != problem.codes
    rows = differs.any(dim=1)
    first = problem.order[differs[:, problem.order].float().argmax(dim=1)]
    at_first = problem.positions.gather(1, first[:, None])[rows]
    from_tie = (at_first - at_first.floor() - 0.5).abs()
    farthest = f"{from_tie.max():.1e}" if len(from_tie) else "–"
    result = Compared(codes.numel(), int(differs.sum()), len(rows), int(rows.sum()))
    share, order = 1 - result.codes_that_differ / result.codes, "act-order" if problem.act_order else "plain"
    shown = f"{result.rows_that_differ} of {result.rows}"
    print(f"| {problem.name} | {problem.bits} | {order} | {share:.4%} | {shown} | {farthest} |", flush=True)
    return result
