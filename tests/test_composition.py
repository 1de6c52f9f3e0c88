"""Two stages in a chain: the second works on transformed inputs and weights, and is not told."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.composition import chain
from harness.conformance.models import tiny_cases
from harness.conformance.running import check_methods
from harness.conformance.subject import Subject
from harness.linear import round_to_nearest
from harness.methods.rtn import RTN
from harness.registry import method_class
from harness.settings import Setting
from harness.transform import BlockRotation, InputTransform, block_hadamard

EXAMPLE = Path(__file__).parents[1] / "examples" / "rotated_gptq.py"
ROTATION = InputTransform(steps=(BlockRotation(block_hadamard(16)),))


class Chained:
    size = stride = 1
    reads = frozenset({"full_precision"})

    def supports(self, setting: Setting) -> str | None:
        return None

    def quantize(self, window, setting):
        plain = window.forward(window.full_precision.chunks[0])
        walked = [stop for (stop,) in window.walk(window.full_precision)]
        transforms = dict.fromkeys(window.shared_inputs, ROTATION)
        part = chain(transforms, Looking(walked, plain), window, setting)
        assert torch.equal(window.forward(window.full_precision.chunks[0]), plain)  # all is put back
        return part


class Looking(RTN):
    """Rounds to nearest, and compares what it is shown with what there was."""

    def __init__(self, walked, plain) -> None:
        object.__setattr__(self, "walked", walked)
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "clip_search", None)

    def quantize(self, window, setting):
        for (stop,), before in zip(window.walk(window.full_precision), self.walked, strict=True):
            expected = ROTATION.apply(before.chunks[0]) if stop.names else before.chunks[0]
            torch.testing.assert_close(stop.chunks[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(window.forward(window.full_precision.chunks[0]), self.plain, rtol=1e-4, atol=1e-4)
        return super().quantize(window, setting)


def test_the_second_stage_sees_transformed_inputs_and_folded_weights() -> None:
    case = next(iter(tiny_cases().values()))
    info, _ = method_class("rtn")
    subject = Subject(info, Chained, case)
    setting = Setting.parse("W4A4g16")
    for name, linear in subject.run(setting).quantized.linears.items():
        weight = subject.model.module.get_submodule(name).weight
        expected = round_to_nearest(weight, setting, transform=ROTATION)
        assert torch.equal(linear.codes, expected.codes)
        assert linear.transform is not None
        assert torch.equal(linear.transform.steps[0].matrix, ROTATION.steps[0].matrix)


def test_linears_that_share_an_input_share_its_transform() -> None:
    info, create = method_class(str(EXAMPLE))
    subject = Subject(info, create, next(iter(tiny_cases().values())))
    linears = subject.run(Setting.parse("W4A4")).quantized.linears
    for names in subject.model.architecture.shared_inputs:
        assert len({id(linears[name].transform) for name in names}) == 1


def test_the_example_passes_conformance() -> None:
    """In a process of its own: the type checker of these tests draws from Python's random numbers."""
    (verdict,) = check_methods([str(EXAMPLE)])
    assert verdict.passed, [row for row in verdict.rows if row["state"] == "failed"]


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
