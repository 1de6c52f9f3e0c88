"""What a quantized linear does to its input before quantizing it: smooth, rotate blocks, permute, rotate again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64

from harness.errors import HarnessError


def block_hadamard(size: int) -> Float[torch.Tensor, "size size"]:
    """Sylvester's Hadamard matrix scaled to be orthogonal; blocks of it where ``size`` is not a power of two."""
    matrix = torch.ones(1, 1)
    while size % (2 * len(matrix)) == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    rotation: torch.Tensor = torch.block_diag(*[matrix * len(matrix) ** -0.5] * (size // len(matrix)))
    return rotation


def block_size_of(size: int, asked: int | None = None, largest: int = 128) -> int:
    """``asked``, or the largest power of two up to ``largest`` that divides ``size``.

    Raises HarnessError when what was asked for does not divide it.
    """
    if asked is None:
        return min(largest, size & -size)
    if size % asked:
        legal = [str(2**k) for k in range(1, 13) if size % 2**k == 0]
        raise HarnessError(
            f"blocks of {asked} do not divide {size} input channels",
            fix=f"choose {', '.join(legal)}, or none for the largest power of two up to {largest}",
        )
    return asked


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

    @cached_property
    def targets(self) -> Int64[torch.Tensor, " c"]:
        """Channel ``j`` of the input becomes channel ``targets[j]``."""
        return self.indices.argsort()

    def apply(self, x: Float[torch.Tensor, "*rows c"]) -> Float[torch.Tensor, "*rows c"]:
        return x.index_select(-1, self.indices)


@dataclass(frozen=True)
class InputTransform:
    """``x ↦ (x / smooth)`` followed by ``steps``, along the last axis; its inverse is folded into the weight."""

    smooth: Float[torch.Tensor, " c"] | None = None
    steps: tuple[BlockRotation | Permutation, ...] = ()

    def multiply_adds(self, channels: int) -> int:
        """Of one token with so many channels."""
        rotations = sum(step.matrix.shape[0] for step in self.steps if isinstance(step, BlockRotation))
        return channels * (rotations + (self.smooth is not None))

    def to(self, device: torch.device | str) -> InputTransform:
        """The same transform with its tensors on ``device``."""
        steps = (
            BlockRotation(step.matrix.to(device))
            if isinstance(step, BlockRotation)
            else Permutation(step.indices.to(device))
            for step in self.steps
        )
        return InputTransform(None if self.smooth is None else self.smooth.to(device), tuple(steps))

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

    def to_tensors(self, owner: str) -> dict[str, torch.Tensor]:
        """Everything in it, by names that begin with ``owner``."""
        tensors = {} if self.smooth is None else {f"{owner}|smooth": self.smooth.contiguous()}
        for i, step in enumerate(self.steps):
            value = step.matrix if isinstance(step, BlockRotation) else step.indices
            kind = "rotation" if isinstance(step, BlockRotation) else "permutation"
            tensors[f"{owner}|step{i}|{kind}"] = value.contiguous()
        return tensors

    @classmethod
    def of_tensors(cls, owner: str, tensors: Mapping[str, torch.Tensor]) -> InputTransform:
        """What :meth:`to_tensors` named after ``owner``; nothing is done to the input where there is none."""
        steps: list[BlockRotation | Permutation] = []
        while True:
            prefix = f"{owner}|step{len(steps)}|"
            if f"{prefix}rotation" in tensors:
                steps.append(BlockRotation(tensors[f"{prefix}rotation"]))
            elif f"{prefix}permutation" in tensors:
                steps.append(Permutation(tensors[f"{prefix}permutation"]))
            else:
                return cls(tensors.get(f"{owner}|smooth"), tuple(steps))
