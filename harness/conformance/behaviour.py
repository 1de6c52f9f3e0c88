"""Checks of how a method gets to its integers, and of what it leaves behind."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import torch

from harness.conformance.subject import Failed, NotApplicable, Subject, differences
from harness.conformance.watching import Stopped
from harness.errors import BadOutput
from harness.models import LoadedModel

_ORDER_SHARE = 0.03  # of codes: sums in another order round otherwise, and a rounding may tip either way


def deterministic(subject: Subject) -> None:
    """The same seed gives the same integers, bit by bit, whatever ran before in the process.

    To pass: draw random numbers from `torch` (the harness seeds it for each window) or from a `torch.Generator` of
    your own made from `window.seed` and `window.index`; keep nothing between calls; sort stably.
    """
    before, states = subject.base.quantized, (random.getstate(), np.random.get_state())
    random.seed(12345)
    np.random.seed(12345)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            again = subject.run().quantized
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if found := differences(before, again):
        name, share = next(iter(found.items()))
        raise Failed(f"a second run gives other integers in {len(found)} layers; {name}: {share:.1%} of its codes")


def order_independent(subject: Subject) -> None:
    """The calibration text is a set of sequences: neither their order nor how they are batched decides integers.

    To pass: sum over all tokens of all chunks; take no sequence, chunk or batch for the whole. A method that trains in
    steps over the sequences declares this an expected failure and says so.
    """
    if not subject.method.reads:
        raise NotApplicable("the method reads no calibration data")
    long = subject.case.calibration(subject.case.long)
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(1))
    shuffled = subject.run(calibration=long[order]).quantized
    for name, share in differences(subject.run(calibration=long).quantized, shuffled).items():
        if share > _ORDER_SHARE:
            raise Failed(f"{name}: {share:.1%} of its codes change with the order of the calibration sequences")


def leaves_the_model_alone(subject: Subject) -> None:
    """The full-precision model is shared by all that runs in the process, and is not the method's to change.

    To pass: write to no parameter or buffer of `window.linears` (clone first), add no hooks, replace no modules;
    return what is to change.
    """
    if subject.base.traces.model:
        raise Failed("; ".join(subject.base.traces.model[:3]))


def leaves_calibration_alone(subject: Subject) -> None:
    """Whoever comes next reads the same hidden states.

    To pass: no operation in place (`+=`, `relu_`, `[...] =`) on the chunks of a stream or of a stop.
    """
    ids = subject.calibration.clone()
    found = [*subject.base.traces.calibration]
    if not torch.equal(ids, subject.calibration):
        found.append("the token ids changed")
    if found:
        raise Failed("; ".join(found[:3]))


def leaves_the_process_alone(subject: Subject) -> None:
    """Another cell in the same process must not feel that this one ran: random states, dtype, TF32, environment, code.

    To pass: use a `torch.Generator` or a `numpy.random.Generator` of your own, put back whatever you switch, keep
    nothing in a module or class (`functools.cache` on what depends on its arguments alone is fine), replace no code.
    """
    if found := subject.base.traces.process or subject.left:
        raise Failed("; ".join(found[:3]))


def resumes(subject: Subject) -> None:
    """Stopped between two windows and started again, it ends with the integers of an undisturbed walk.

    To pass: hand on what the next window needs as `QuantizedWindow.state`, keep nothing on `self` or in the module,
    and give as `outputs` only streams that the quantized window really produces.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject.run(checkpoints=Path(folder), stop_at=1)
        except Stopped:
            resumed = subject.run(checkpoints=Path(folder)).quantized
        else:
            raise NotApplicable("the method takes the whole model as one window")
    if found := differences(subject.base.quantized, resumed):
        name, share = next(iter(found.items()))
        raise Failed(f"resumed, {len(found)} layers have other integers; {name}: {share:.1%} of its codes")


def says_progress(subject: Subject) -> None:
    """Whoever waits sees how far it is.

    To pass: nothing; call `window.progress(what)` where a window takes more than a few seconds.
    """
    said = subject.base.progress
    done = [count for count, _, _ in said]
    if done != sorted(done) or not said or said[-1][0] != said[-1][1]:
        raise Failed(f"progress does not rise to its end: {done}")
    if not all(isinstance(detail, str) for _, _, detail in said):
        raise Failed("window.progress was given something that is no string")


def nan_is_refused(subject: Subject) -> None:
    """A number that is none never becomes a score: NaN in what the method reads ends the cell, naming the layer.

    To pass: raise nothing yourself and hide nothing: no `nan_to_num`, no bare `except`. The harness looks at weights,
    Hessians and scales; look at whatever else you derive from the streams.
    """
    if not subject.method.reads:
        raise NotApplicable("the method reads no calibration data")
    model = subject.case.build()
    _first_norm(model, model.architecture.blocks[0].name)[0] = torch.nan
    try:
        subject.run(model=model)
    except BadOutput:
        return
    except Exception as error:
        raise Failed(f"NaN activations raised {type(error).__name__}: {error}, not BadOutput") from error
    raise Failed("NaN activations gave integers as if nothing had happened")


def hard_weights(subject: Subject) -> None:
    """Layers of zeros, rows of one sign, dead input channels and a single outlier give sound integers.

    To pass: divide by nothing that can be zero; take ranges that include zero, as `find_grid` does.
    """
    model = subject.case.build()
    blocks = model.architecture.blocks
    zero, signed, outlier = blocks[0].linears[0], blocks[0].linears[-1], blocks[1].linears[0]
    with torch.no_grad():
        weight = {name: model.module.get_parameter(f"{name}.weight") for name in (zero, signed, outlier)}
        weight[zero].zero_()
        weight[signed].abs_()
        weight[signed][1::2].neg_()
        weight[outlier][0, 0] = 50.0
        _first_norm(model, blocks[1].name)[:3] = 0.0
    try:
        linears = subject.run(model=model).quantized.linears
    except Exception as error:  # whatever it raises is the finding
        raise Failed(f"{type(error).__name__}: {error}") from error
    if float(linears[zero].weight().abs().max()) > 0:
        raise Failed(f"{zero} is all zero, and its integers are not")
    if linears[signed].transform is None and bool((linears[signed].weight() * weight[signed].sign() < 0).any()):
        raise Failed(f"the rows of {signed} have one sign each, and its integers have the other, too")


def _first_norm(model: LoadedModel, block: str) -> torch.Tensor:
    """The weight of the norm before the first linears of ``block``."""
    parameters = model.module.get_submodule(block).named_parameters()
    return next(p.data for name, p in parameters if p.ndim == 1 and name.endswith(".weight"))
