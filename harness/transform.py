"""What a quantized linear does to its input before quantizing it: smooth, rotate blocks, permute, rotate again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64


@dataclass(frozen=True)
class BlockRotation:
    """Each block of B consecutive channels times one orthogonal matrix, the same for all blocks."""

    matrix: Float[torch.Tensor, "b b"]

    def apply(self, x: Float[torch.Tensor, "*rows c"]) -> Float[torch.Tensor, "*rows c"]:
        blocks = x.reshape(*x.shape[:-1], -1, self.matrix.shape[0])
        return (blocks @ self.matrix.to(x.dtype)).reshape(x.shape)


@dataclass(frozen=True)
class Permutation:
    """Channel ``indices[j]`` of the input becomes channel ``j``."""

    indices: Int64[torch.Tensor, " c"]

    def apply(self, x: Float[torch.Tensor, "*rows c"]) -> Float[torch.Tensor, "*rows c"]:
        return x.index_select(-1, self.indices)


@dataclass(frozen=True)
class InputTransform:
    """``x ↦ (x / smooth)`` followed by ``steps``, along the last axis; its inverse is folded into the weight."""

    smooth: Float[torch.Tensor, " c"] | None = None
    steps: tuple[BlockRotation | Permutation, ...] = ()

    def apply(self, x: Float[torch.Tensor, "*rows c"]) -> Float[torch.Tensor, "*rows c"]:
        """The transformed input of the layer."""
        return self._steps(x if self.smooth is None else x / self.smooth.to(x.dtype))

    def fold(self, weight: Float[torch.Tensor, "out c"]) -> Float[torch.Tensor, "out c"]:
        """The weight that, applied to the transformed input, gives what ``weight`` gives for the plain one.

        The steps are orthogonal, so folding the inverse of the transform means applying them to the rows as well.
        """
        return self._steps(weight if self.smooth is None else weight * self.smooth)

    def _steps(self, x: Float[torch.Tensor, "*rows c"]) -> Float[torch.Tensor, "*rows c"]:
        for step in self.steps:
            x = step.apply(x)
        return x
