"""The one quantizer of the harness: every method's integers come from here.

Conventions (``specs`` of the field differ, so these are pinned):

* a range always includes zero; a group that is all zero gets the range −1..1;
* asymmetric: ``s = (hi − lo) / M``, ``z = round(−lo / s)``, ``q = clamp(round(w / s) + z, 0, M)``, ``M = 2^bits − 1``;
* symmetric: the range is reflected, ``s = 2·max|w| / M``, ``z = 2^(bits−1)``;
* scales are rounded to their storage type, float16, before zero points and codes are computed from them;
* rounding is half to even; 2-bit weights are searched for the best clipping by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float16, UInt8

from harness.errors import HarnessError
from harness.settings import UNQUANTIZED, Setting

Axis = Literal["oc", "ic"]

SCALE_DTYPE = torch.float16
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a scale never rounds to zero
SEARCH_BITS = 2  # at and below this width min-max wastes half of the levels on outliers
# The range is shrunk to these fractions of min-max, then to those around the best of them (each row's own).
SEARCH_COARSE = tuple(1 - i / 25 for i in range(20))  # 1.00, 0.96, …, 0.24
SEARCH_FINE = (-0.02, -0.01, 0.01, 0.02)
SEARCH_NORM = 2.5  # exponent of the error that the search minimises
_CHUNK = 1 << 17  # elements worked on at once: they and their temporaries stay in the cache


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of a linear layer is cut into groups and rounded."""

    bits: int
    group_size: int | None = None
    """Weights that share a scale; None: a whole output channel (``oc``) or input channel (``ic``)."""
    symmetric: bool = False
    axis: Axis = "oc"
    clip_search: bool = False
    clip: float = 1.0
    """Fraction of each group's range that is kept, before any search."""

    @classmethod
    def of(cls, setting: Setting, axis: Axis = "oc") -> WeightFormat:
        """The format that a setting asks for, with clip search where it is the default."""
        if setting.weight_bits == UNQUANTIZED:
            raise HarnessError(f"setting {setting} does not quantize weights", fix="choose a setting with W2 to W8")
        return cls(
            bits=setting.weight_bits,
            group_size=setting.group_size,
            symmetric=setting.symmetric,
            axis=axis,
            clip_search=setting.weight_bits <= SEARCH_BITS,
        )

    def searched(self, clip_search: bool | None) -> WeightFormat:
        """This format with the clip search switched on or off; None leaves it as it is."""
        return self if clip_search is None else replace(self, clip_search=clip_search)


@dataclass(frozen=True)
class Grid:
    """The levels that the weights of each group are rounded to: ``(code − zero) · scale``.

    Axis ``oc``: shape [out, in / g]. Axis ``ic``: shape [out / g, in].
    """

    scales: Float16[torch.Tensor, "a b"]
    zeros: UInt8[torch.Tensor, "a b"]
    format: WeightFormat


def find_grid(weight: Float[torch.Tensor, "out in"], format: WeightFormat) -> Grid:
    """The grid of ``weight``: min-max, or the best of the shrunk ranges where ``format.clip_search``.

    Raises HarnessError when the groups do not divide the layer.
    """
    groups = _grouped(weight, format)
    scales, zeros = grid_of_rows(groups.reshape(-1, groups.shape[-1]), format)
    scales, zeros = (t.reshape(groups.shape[:2]) for t in (scales, zeros))
    if format.axis == "ic":
        scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    return Grid(scales.to(SCALE_DTYPE), zeros.to(torch.uint8), format)


def encode(weight: Float[torch.Tensor, "out in"], grid: Grid) -> UInt8[torch.Tensor, "out in"]:
    """The codes 0..2^bits−1 of ``weight`` on ``grid``."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    levels = 2**grid.format.bits - 1
    for w, code, scale, zero in _pieces(grid, weight, codes):
        code.copy_((w.float() / scale).round_().add_(zero).clamp_(0, levels))
    return codes


def decode(codes: UInt8[torch.Tensor, "out in"], grid: Grid) -> Float[torch.Tensor, "out in"]:
    """The float32 weights that ``codes`` stand for."""
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for code, w, scale, zero in _pieces(grid, codes, weight):
        torch.sub(code, zero, out=w)
        w.mul_(scale)
    return weight


def _pieces(grid: Grid, *matrices: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Matching pieces of ``matrices`` [out, in], and scale and zero point broadcast to them.

    They are small enough that they and what is made of them stay in the cache, and nothing as large as a weight is
    allocated on the way.
    """
    along = 1 if grid.format.axis == "oc" else 0  # the dimension that groups run along
    groups = grid.scales.shape[along]
    views = [matrix.unflatten(along, (groups, matrix.shape[along] // groups)) for matrix in matrices]
    scales, zeros = (t.float().unsqueeze(along + 1) for t in (grid.scales, grid.zeros))
    step = max(1, _CHUNK // views[0][0].numel()) if matrices[0].device.type == "cpu" else len(views[0])
    for start in range(0, len(views[0]), step):
        piece = slice(start, start + step)
        yield (*(view[piece] for view in views), scales[piece], zeros[piece])


def expand(grid: Grid, shape: torch.Size) -> tuple[Float[torch.Tensor, "#out #in"], Float[torch.Tensor, "#out #in"]]:
    """Scale and zero point of every weight, float32, broadcastable to [out, in]."""
    scales, zeros = grid.scales.float(), grid.zeros.float()
    for dim in (0, 1):
        repeats = shape[dim] // scales.shape[dim]
        if 1 < repeats < shape[dim]:
            scales, zeros = (t.repeat_interleave(repeats, dim) for t in (scales, zeros))
    return scales, zeros


def grid_of_rows(
    rows: Float[torch.Tensor, "n g"], format: WeightFormat
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
    """Scale and zero point, as float32, for each row taken as one group. Scales are exact float16 values."""
    lo, hi = (bound * format.clip for bound in range_of_rows(rows.float(), format))
    return _search(rows.float(), lo, hi, format) if format.clip_search else grid_of_ranges(lo, hi, format)


def range_of_rows(
    rows: Float[torch.Tensor, "n g"], format: WeightFormat
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
    """Lowest and highest value of each row, widened to hold zero; −1 and 1 where all are zero."""
    lo, hi = rows.amin(dim=1).clamp_(max=0), rows.amax(dim=1).clamp_(min=0)
    empty = (lo == 0) & (hi == 0)
    lo, hi = torch.where(empty, -1.0, lo), torch.where(empty, 1.0, hi)
    if format.symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    return lo, hi


def grid_of_ranges(
    lo: Float[torch.Tensor, " n"], hi: Float[torch.Tensor, " n"], format: WeightFormat
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
    """Scale and zero point of groups with these ranges. Scales are exact float16 values."""
    levels = 2**format.bits - 1
    scale = store((hi - lo) / levels)
    zero = (
        torch.full_like(scale, 2 ** (format.bits - 1)) if format.symmetric else (-lo / scale).round().clamp(0, levels)
    )
    return scale, zero


def store(scale: Float[torch.Tensor, "*any"]) -> Float[torch.Tensor, "*any"]:
    """``scale`` as its storage type will hold it, in float32."""
    return scale.clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE).float()


def _search(
    rows: Float[torch.Tensor, "n g"],
    lo: Float[torch.Tensor, " n"],
    hi: Float[torch.Tensor, " n"],
    format: WeightFormat,
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
    """For each row the shrink factor, and at 2 bits the neighbour of −lo/s as zero point, with the least error."""
    step = max(1, _CHUNK // rows.shape[1])
    parts = [
        _search_chunk(rows[i : i + step].T.contiguous(), lo[i : i + step], hi[i : i + step], format)
        for i in range(0, rows.shape[0], step)
    ]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search_chunk(
    columns: Float[torch.Tensor, "g n"],  # one group a column: per-group values then broadcast along memory
    lo: Float[torch.Tensor, " n"],
    hi: Float[torch.Tensor, " n"],
    format: WeightFormat,
) -> tuple[Float[torch.Tensor, " n"], Float[torch.Tensor, " n"]]:
    levels = 2**format.bits - 1
    buffers = torch.empty_like(columns), torch.empty_like(columns)
    scale, zero = grid_of_ranges(lo, hi, format)
    error, best = _search_error(columns, scale, zero, levels, buffers), torch.ones_like(lo)

    def attempt(shrink: Float[torch.Tensor, " n"]) -> None:
        nonlocal error, best, scale, zero
        new_scale, nearest = grid_of_ranges(lo * shrink, hi * shrink, format)
        for new_zero in _zero_candidates(lo * shrink, new_scale, nearest, format):
            new_error = _search_error(columns, new_scale, new_zero, levels, buffers)
            better = new_error < error
            error = torch.where(better, new_error, error)
            best = torch.where(better, shrink, best)
            scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)

    for coarse in SEARCH_COARSE:
        attempt(torch.full_like(lo, coarse))
    around = best
    for fine in SEARCH_FINE:
        attempt((around + fine).clamp(max=1))
    return scale, zero


def _zero_candidates(
    lo: Float[torch.Tensor, " n"],
    scale: Float[torch.Tensor, " n"],
    nearest: Float[torch.Tensor, " n"],
    format: WeightFormat,
) -> tuple[Float[torch.Tensor, " n"], ...]:
    if format.symmetric or format.bits > SEARCH_BITS:
        return (nearest,)
    below = (-lo / scale).floor().clamp(0, 2**format.bits - 1)
    return below, (below + 1).clamp(max=2**format.bits - 1)


def _search_error(
    columns: Float[torch.Tensor, "g n"],
    scale: Float[torch.Tensor, " n"],
    zero: Float[torch.Tensor, " n"],
    levels: int,
    buffers: tuple[Float[torch.Tensor, "g n"], Float[torch.Tensor, "g n"]],
) -> Float[torch.Tensor, " n"]:
    """Σ |w − ŵ|^SEARCH_NORM of each column; ``buffers`` are scratch space."""
    error, root = buffers
    torch.div(columns, scale, out=error)
    error.round_()
    torch.clamp(error, min=-zero, max=levels - zero, out=error)
    error.mul_(scale).sub_(columns).abs_()
    torch.sqrt(error, out=root)
    error.square_().mul_(root)  # |e|^2.5 without a general power, which costs three times all the rest
    return error.sum(dim=0)


def _grouped(weight: Float[torch.Tensor, "out in"], format: WeightFormat) -> Float[torch.Tensor, "rows groups g"]:
    view = weight if format.axis == "oc" else weight.T
    rows, length = view.shape
    size = format.group_size or length
    check_group(length, size, format.axis)
    return view.reshape(rows, length // size, size)


def check_group(length: int, size: int, axis: Axis = "oc") -> None:
    """Raises HarnessError, naming the sizes that would do, when groups of ``size`` do not divide ``length``."""
    if length % size:
        legal = [n for n in (16, 32, 64, 128, 256) if length % n == 0]
        raise HarnessError(
            f"groups of {size} do not divide {length} {'inputs' if axis == 'oc' else 'outputs'}",
            fix=f"choose {', '.join(f'g{n}' for n in legal)} or one group per channel (no g)",
        )


@dataclass(frozen=True)
class ActivationSpec:
    """How a linear layer's input, or a key or value, is quantized: per token, dynamically."""

    bits: int
    symmetric: bool = False
    clip: float = 1.0
    """Fraction of each token's range that is kept."""

    @classmethod
    def of(cls, setting: Setting, clip: float = 1.0) -> ActivationSpec | None:
        return cls(setting.activation_bits, setting.symmetric, clip) if setting.quantizes_activations else None


def token_grid(
    x: Float[torch.Tensor, "*tokens features"], spec: ActivationSpec
) -> tuple[Float[torch.Tensor, "*tokens 1"], Float[torch.Tensor, "*tokens 1"]]:
    """Scale and zero point of each token, float32. The range includes zero; an all-zero token gets −1..1."""
    levels = 2**spec.bits - 1
    lo, hi = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # 5 × as fast as torch.aminmax on a CPU
    lo, hi = lo.float().clamp(max=0) * spec.clip, hi.float().clamp(min=0) * spec.clip
    if spec.symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    scale = (hi - lo) / levels
    scale = torch.where(scale == 0, 2.0 / levels, scale)
    zero = torch.full_like(scale, 2 ** (spec.bits - 1)) if spec.symmetric else (-lo / scale).round_()
    return scale, zero


def encode_tokens(
    x: Float[torch.Tensor, "*tokens features"], spec: ActivationSpec
) -> tuple[UInt8[torch.Tensor, "*tokens features"], Float[torch.Tensor, "*tokens 1"], Float[torch.Tensor, "*tokens 1"]]:
    """Codes, scales and zero points of each token: what an integer kernel is given."""
    scale, zero = token_grid(x, spec)
    codes = (x.float() / scale).round_().add_(zero).clamp_(0, 2**spec.bits - 1)
    return codes.to(torch.uint8), scale, zero


def simulate_tokens(
    x: Float[torch.Tensor, "*tokens features"], spec: ActivationSpec
) -> Float[torch.Tensor, "*tokens features"]:
    """``x`` quantized and back, in its own dtype."""
    levels, scale = levels_of_tokens(x, spec)
    return levels.mul_(scale).to(x.dtype)


def levels_of_tokens(
    x: Float[torch.Tensor, "*tokens features"], spec: ActivationSpec
) -> tuple[Float[torch.Tensor, "*tokens features"], Float[torch.Tensor, "*tokens 1"]]:
    """Codes less the zero point, as float32, and scales."""
    scale, zero = token_grid(x, spec)
    levels = x.float() / scale
    torch.clamp(levels.round_(), min=-zero, max=(2**spec.bits - 1) - zero, out=levels)
    return levels, scale
