"""Checks of what a method returns."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float

from harness.conformance.subject import Failed, NotApplicable, Subject
from harness.errors import BadOutput
from harness.linear import QuantizedLinear, round_to_nearest
from harness.quantized import QuantizedModel
from harness.settings import Setting
from harness.terms import off_orthogonal
from harness.transform import BlockRotation

_LARGEST_ROTATION = 512  # one for all blocks of a layer: nothing of a weight fits into it
_MOST_STEPS = 8
_ALIKE = 0.9  # cosine at 4 bits; random matrices have 0, rounding to nearest has more than 0.99
_ALIKE_AT_2_BITS = 0.6
_LITTLE = 0.05  # of the logits: what rounding to 8 bits costs at most, with ranges clipped
_BEHIND = 1.6  # times the error of plain rounding; a method that wastes one of 4 bits is at 1.8


def codes_within_bits(subject: Subject) -> None:
    """Every code and zero point fits into the bits of the setting, and the grid is finite and positive.

    To pass: clamp codes to 0..2^bits−1 (`harness.quantizer.encode` does), and change nothing after the
    `QuantizedLinear` is made.
    """
    for name, linear in subject.base.quantized.linears.items():
        if type(linear) is not QuantizedLinear:
            raise Failed(f"{name} is a {type(linear).__name__}, not a QuantizedLinear")
        try:
            replace(linear)  # its constructor looks again: tensors can be changed behind its back
        except BadOutput as error:
            raise Failed(f"{name}: {error.what}") from error


def honest_bits(subject: Subject) -> None:
    """What is stored is what the setting says, and no weight hides elsewhere: in scales, tiny groups or transforms.

    To pass: groups of the size that the setting asks for, at most 2^bits levels in each, orthogonal rotations that
    all blocks of a layer share, and a bias only where the layer has one.
    """
    for name, linear in subject.base.quantized.linears.items():
        for fault in _hiding_places(linear, subject):
            raise Failed(f"{name}: {fault}")
        if linear.bias is not None and subject.model.module.get_submodule(name).bias is None:
            raise Failed(f"{name}: a bias, which the layer has none of")


def _hiding_places(linear: QuantizedLinear, subject: Subject) -> Iterator[str]:
    levels = _most_levels(linear)
    if levels > 2**subject.setting.weight_bits:
        yield f"{levels} distinct weights in a group, more than {subject.setting.weight_bits} bits have"
    if linear.transform is None:
        return
    if len(linear.transform.steps) > _MOST_STEPS:
        yield f"{len(linear.transform.steps)} steps in its transform"
    for step in linear.transform.steps:
        if isinstance(step, BlockRotation):
            yield from _rotation_faults(step.matrix, linear.codes.shape[1])
        elif not torch.equal(step.indices.sort().values, torch.arange(linear.codes.shape[1])):
            yield "a permutation in its transform repeats or leaves out channels"
    if linear.transform.smooth is not None and linear.transform.smooth.shape != (linear.codes.shape[1],):
        yield "its smoothing is not one scale for each channel"


def _rotation_faults(matrix: Float[torch.Tensor, "b b"], channels: int) -> Iterator[str]:
    size = len(matrix)
    if size > _LARGEST_ROTATION or channels % size:
        yield f"a rotation of {size} channels in its transform"
    if (off := off_orthogonal(matrix)) is not None:
        yield f"a rotation in its transform is not orthogonal: R Rᵀ is off by {off:.2g}"


def _most_levels(linear: QuantizedLinear) -> int:
    weight = linear.weight() if linear.axis == "oc" else linear.weight().T
    groups = weight.reshape(-1, linear.group_size).sort(dim=1).values
    return int((groups[:, 1:] != groups[:, :-1]).sum(dim=1).max()) + 1


def every_layer_quantized(subject: Subject) -> None:
    """Each layer's integers stand for that layer's weight, as far as its bits go; none is left out or swapped.

    To pass: return every linear of the window under its own name. Scales may be folded into rows and columns: they
    are taken out before the two are compared.
    """
    modules = dict(subject.model.module.named_modules())
    least = _ALIKE if subject.setting.weight_bits > 2 else _ALIKE_AT_2_BITS
    for name, linear in subject.base.quantized.linears.items():
        weight = modules[name].weight
        assert isinstance(weight, torch.Tensor)
        transform = linear.transform
        # Steps are orthogonal: applied to both sides, they leave the comparison what it is.
        expected = transform.fold(weight.float()) if transform else weight.float()
        cosine = _cosine(expected, linear.weight(), scaled=transform is None)
        if not cosine >= least:
            raise Failed(f"{name}: its integers have a cosine of {cosine:.2f} with its weight, below {least}")


def _cosine(one: Float[torch.Tensor, "out in"], other: Float[torch.Tensor, "out in"], *, scaled: bool) -> float:
    """Of two matrices, whatever their rows and (without a transform) their columns are multiplied by."""
    one, other = one.clone(), other.clone()
    for _ in range(4 if scaled else 1):
        for matrix in (one, other):
            matrix /= matrix.norm(dim=1, keepdim=True).clamp(min=1e-12)
            if scaled:
                matrix /= matrix.norm(dim=0, keepdim=True).clamp(min=1e-12)
    return float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-12))


def function_preserved(subject: Subject) -> None:
    """Transforms and folded norms leave the full-precision function what it was: with 8 bits little is lost.

    To pass: fold into a weight exactly what the transform or the norm takes out of its input
    (`InputTransform.fold`, `harness.folding`), in float32.
    """
    fine = subject.first_supported("W8A16g16", "W8A16", "W8A8g16", "W8A8", "W4A16g16")
    error, most = subject.error(subject.at(fine).quantized), _LITTLE if fine.weight_bits == 8 else 0.35
    if not error <= most:
        raise Failed(f"at {fine} the logits are off by {error:.1%}, more than {most:.0%}: this is not rounding")


def runs_as_packed(subject: Subject) -> None:
    """What is scored is what is stored: written, read back and run, the model gives the same logits, bit by bit.

    To pass: nothing, as long as the `QuantizedLinear`s hold all there is to say.
    """
    quantized = subject.base.quantized
    with tempfile.TemporaryDirectory() as folder:
        replace(quantized, report=()).save(Path(folder) / "model.safetensors")
        stored = QuantizedModel.load(Path(folder) / "model.safetensors")
    off = float((subject.logits(quantized) - subject.logits(stored)).abs().max())
    if off != 0:
        raise Failed(f"the stored model's logits differ from those of the model in memory by up to {off:.3g}")


def more_bits_are_better(subject: Subject) -> None:
    """The error falls as bits grow, and is at no number of bits far above plain rounding's.

    To pass: do not fall behind `round_to_nearest` on the same setting; a method that is made for something else
    (pruning, learned codes) declares this an expected failure and says why.
    """
    settings = [f"W{bits}A16g16" for bits in (2, 4, 8)]
    supported = [text for text in settings if subject.method.supports(_setting(text)) is None]
    if len(supported) < 2:
        raise NotApplicable("the method supports fewer than two of " + ", ".join(settings))
    errors = {text: subject.error(subject.at(_setting(text)).quantized) for text in supported}
    for low, high in pairwise(supported):
        if not errors[high] < errors[low]:
            raise Failed(f"the logits are off by {errors[low]:.1%} at {low}, and by {errors[high]:.1%} at {high}")
    for text in supported:
        plain = subject.error(_rounded(subject, _setting(text)))
        if not errors[text] <= max(_BEHIND * plain, _LITTLE):
            raise Failed(f"at {text} the logits are off by {errors[text]:.1%}, with plain rounding by {plain:.1%}")


def _rounded(subject: Subject, setting: Setting) -> QuantizedModel:
    """Every layer rounded to nearest."""
    modules = dict(subject.model.module.named_modules())
    linears = {}
    for name in subject.base.quantized.linears:
        weight, bias = modules[name].weight, modules[name].bias
        assert isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
        linears[name] = round_to_nearest(weight, setting, bias=bias)
    return QuantizedModel(linears)


def reports_layers(subject: Subject) -> None:
    """The per-layer report has one row for every linear, and any JSON reader can read it.

    To pass: one row for each linear with its name under `layer`, and numbers that are finite.
    """
    rows = subject.base.quantized.report
    try:
        json.dumps(rows, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Failed(f"the report is not JSON: {error}") from error
    named = [row.get("layer") for row in rows]
    if sorted(map(str, named)) != sorted(subject.base.quantized.linears):
        missing = sorted(set(subject.base.quantized.linears) - set(named))
        raise Failed(f"the report has {len(rows)} rows for {len(subject.base.quantized.linears)} linears; {missing=}")


def _setting(text: str) -> Setting:
    return Setting.parse(text)
