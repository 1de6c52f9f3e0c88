"""Random quantized layers of every shape and kind that the kernels take."""

from __future__ import annotations

import torch

from harness.linear import QuantizedLinear
from harness.quantizer import ActivationSpec, Axis
from harness.transform import InputTransform


def random_layer(
    out: int,
    inputs: int,
    *,
    bits: int = 4,
    group: int | None = None,
    axis: Axis = "oc",
    symmetric: bool = False,
    bias: bool = False,
    activation: ActivationSpec | None = None,
    transform: InputTransform | None = None,
    seed: int = 0,
    extreme: bool = False,
) -> QuantizedLinear:
    """``extreme``: only the lowest and highest codes and zero points."""
    generator = torch.Generator().manual_seed(seed)
    length = inputs if axis == "oc" else out
    group = group or length
    grid = (out, inputs // group) if axis == "oc" else (out // group, inputs)
    top = 2**bits - 1

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randint(0, top + 1, shape, generator=generator)
        return ((values > top // 2) * top if extreme else values).to(torch.uint8)

    return QuantizedLinear(
        codes=draw((out, inputs)),
        scales=(torch.rand(grid, generator=generator) * 0.1 + 0.01).half(),
        zeros=torch.full(grid, 2 ** (bits - 1), dtype=torch.uint8) if symmetric else draw(grid),
        bits=bits,
        group_size=group,
        axis=axis,
        bias=torch.randn(out, generator=generator) if bias else None,
        activation=activation,
        transform=transform,
    )
