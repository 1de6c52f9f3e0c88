"""What is done to a window before grids are found: outlier channels scaled down, or all channels rotated.

Both leave the full-precision function as it is. CFP scales are worked into norms and weights and cost nothing at run
time; where nothing can take them (after a GELU, say) channels stay as they are. Rotations are applied to the inputs as
they come, and then DuQuant's smoothing takes the place of CFP's scales: what a rotation spreads is no outlier any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float

from harness.attention import AttentionSpec
from harness.folding import Smoothed, find_folds, smooth
from harness.method import QuantizedWindow, Report
from harness.methods.cbq_cfp import Outliers, channel_scales
from harness.methods.duquant import DuQuant, smoothing_scale
from harness.transform import InputTransform
from harness.window import SharedInput, Window

Rotate = Literal["none", "hadamard", "duquant"]
Names = tuple[str, ...]
Channels = Float[torch.Tensor, " in"]


@dataclass(frozen=True)
class Prepared:
    """A window with its channels scaled and rotated: the same function in full precision."""

    smoothed: Smoothed
    raw_scales: Mapping[Names, Channels]
    """By shared input, before they were made equal where they must be."""
    transforms: Mapping[Names, InputTransform]
    attention: Mapping[str, AttentionSpec]

    @cached_property
    def weights(self) -> dict[str, Float[torch.Tensor, "_out _in"]]:
        """In float32, as they act on the transformed inputs."""
        weights = dict(self.smoothed.weights)
        for names, transform in self.transforms.items():
            rotation = InputTransform(steps=transform.steps)  # scales are in the weights already
            weights |= {name: rotation.fold(weights[name]) for name in names}
        return weights

    @property
    def surroundings(self) -> QuantizedWindow:
        """Norms and attention as they ship, without linears."""
        return QuantizedWindow({}, self.smoothed.norms, self.attention)

    def described(self, name: str) -> Report:
        """What is done to the input of the linear ``name``."""
        scale = next((scale for names, scale in self.smoothed.scales.items() if name in names), None)
        if scale is None:
            return {}
        return {"channels_scaled": int((scale != 1).sum()), "channel_scale_max": float(scale.max())}

    def state(self, linears: Iterable[str]) -> dict[str, torch.Tensor]:
        """Scales and rotations of the inputs of ``linears``, for the next window."""
        kept = set(linears)
        state = {f"{names[0]}|scale": scale for names, scale in self.raw_scales.items() if names[0] in kept}
        for names, transform in self.transforms.items():
            if names[0] in kept:
                state |= InputTransform(steps=transform.steps).to_tensors(names[0])
        return state


@dataclass(frozen=True)
class Preparation:
    """Chooses scales and rotations by what the untouched model's inputs look like."""

    outliers: Outliers | None
    """which channels CFP scales, if any"""
    exponent: float
    rotate: Rotate

    def of(self, window: Window) -> Prepared:
        """The window prepared; what the window before has settled stays."""
        if self.outliers is None and self.rotate == "none":
            return Prepared(smooth(window, {}, {}), {}, {}, window.attention)
        folds = find_folds(window, one_to_one=False)
        scales = {
            names: scale for names in window.shared_inputs if (scale := _carried_scale(window, names)) is not None
        }
        means: dict[Names, torch.Tensor] = {}
        for (stop,) in window.walk(window.full_precision) if len(scales) < len(window.shared_inputs) else ():
            if stop.names and stop.names not in scales:
                scales[stop.names] = self.scale(window, stop, foldable=stop.names in folds)
                if self.rotate != "none":
                    means[stop.names] = self.rotator.search_input(stop, None)
        smoothed = smooth(window, scales, folds)
        transforms: dict[Names, InputTransform] = {}
        generator = torch.Generator().manual_seed(window.seed * 1_000_003 + window.index)
        for names in window.shared_inputs:
            steps = InputTransform.of_tensors(names[0], window.carried).steps
            if names in means:
                steps, _ = self.rotator.find_steps(means.pop(names) / smoothed.scales[names], generator)
            if steps:
                transforms[names] = InputTransform(smoothed.online.get(names), steps)
        attention = self.rotator.attention(window) if self.rotate != "none" else window.attention
        return Prepared(smoothed, scales, transforms, attention)

    def scale(self, window: Window, stop: SharedInput, *, foldable: bool) -> Channels:
        """By how much each channel of an input is divided."""
        absmax = stop.absmax().float()
        if self.rotate != "none":
            largest = torch.stack([window.linears[name].weight.abs().amax(dim=0) for name in stop.names]).amax(dim=0)
            return smoothing_scale(absmax, largest, self.rotator.alpha)
        assert self.outliers is not None
        scale, _ = channel_scales(absmax, self.outliers, self.exponent)
        return scale if foldable else torch.ones_like(scale)

    @cached_property
    def rotator(self) -> DuQuant:
        """DuQuant's transformation, searched on the mean of the inputs, or Hadamard blocks alone."""
        if self.rotate == "hadamard":
            return DuQuant(rotation="hadamard", permutation_times=0, calibration="paper")
        return DuQuant(calibration="paper")


def _carried_scale(window: Window, names: Names) -> Channels | None:
    return window.carried.get(f"{names[0]}|scale")
