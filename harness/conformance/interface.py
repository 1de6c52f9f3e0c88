"""Checks of what a method says about itself. They need no model, or only the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from harness.conformance.subject import Failed, NotApplicable, Subject
from harness.errors import HarnessError, Unsupported
from harness.quantizer import ActivationSpec
from harness.settings import ACTIVATION_BITS, UNQUANTIZED, WEIGHT_BITS, Setting

_STREAMS = frozenset({"full_precision", "quantized", "mean"})
_TRIED = (
    "W8A16", "W4A16g16", "W4A16g16sym", "W3A16", "W2A16g16", "W8A8", "W4A8", "W4A8sym", "W4A4", "W4A4KV4", "W16A8",
)  # fmt: skip


def interface(subject: Subject) -> None:
    """The harness can hold the class: a frozen dataclass that can be made without arguments and says what it is.

    To pass: `@register("name")` above `@dataclass(frozen=True)`, a docstring, a literal default for every field,
    `size`, `stride` and `reads`, and no work when it is made.
    """
    method: Any = subject.method
    facts = getattr(type(method), "__dataclass_params__", None)
    if facts is None or not facts.frozen:
        raise Failed("the class is not a frozen dataclass")
    if not subject.info.summary or subject.info.summary.startswith(f"{type(method).__name__}("):
        raise Failed("the class has no docstring, so no list can say what the method is")
    if not (isinstance(method.size, int) and isinstance(method.stride, int) and 1 <= method.stride <= method.size):
        raise Failed(f"size is {method.size!r} and stride {method.stride!r}; a window moves by 1 to size blocks")
    if not isinstance(method.reads, frozenset) or not method.reads <= _STREAMS:
        raise Failed(f"reads is {method.reads!r}, not a frozenset of {', '.join(sorted(_STREAMS))}")
    fields = {field.name: field.default for field in dataclasses.fields(method) if field.init}
    declared = {option.name: option.default for option in subject.info.options}
    if fields != declared:
        raise Failed(f"the options read from the source are {declared}, the fields of the class are {fields}")


def settings_answered(subject: Subject) -> None:
    """`supports` answers for every setting at once, so that a plan can be refused before it starts.

    To pass: return None or a reason in words for every setting, the same whenever asked, without raising; support at
    least one setting, and none without quantized weights unless the method has something to do there.
    """
    settings = [Setting(w, a, symmetric=s) for w in WEIGHT_BITS for a in ACTIVATION_BITS for s in (False, True)]
    answers = {}
    for setting in settings:
        try:
            answer = subject.method.supports(setting)
        except Exception as error:  # whatever it raises is the finding
            raise Failed(f"supports({setting}) raised {type(error).__name__}: {error}") from error
        if answer is not None and not (isinstance(answer, str) and answer.strip()):
            raise Failed(f"supports({setting}) returned {answer!r}, neither None nor a reason")
        if answer != subject.create().supports(setting):
            raise Failed(f"supports({setting}) gives another answer the second time")
        answers[setting] = answer
    if all(answers.values()):
        raise Failed("no setting is supported")


def settings_kept(subject: Subject) -> None:
    """A setting that is supported is what comes out: bits, groups, activations and symmetry as asked.

    To pass: take the format from `WeightFormat.of(setting)` and the activations from `ActivationSpec.of(setting)`
    (`round_to_nearest` and `assemble` do both), and name in `supports` the settings that you cannot do.
    """
    tried = [setting for setting in map(Setting.parse, _TRIED) if subject.method.supports(setting) is None]
    for setting in tried:
        try:
            quantized = subject.at(setting).quantized
        except Exception as error:  # whatever it raises is the finding
            raise Failed(f"{setting} is said to be supported, but: {type(error).__name__}: {error}") from error
        for name, linear in quantized.linears.items():
            for fault in _faults(linear, setting):
                raise Failed(f"at {setting}, {name} has {fault}")
        if setting.quantizes_kv and not quantized.attention:
            raise Failed(f"at {setting}, keys and values are not quantized")


def _faults(linear: object, setting: Setting) -> Iterator[str]:
    from harness.linear import QuantizedLinear

    assert isinstance(linear, QuantizedLinear)
    along = linear.codes.shape[1] if linear.axis == "oc" else linear.codes.shape[0]
    wanted = ActivationSpec.of(setting)
    if setting.weight_bits != UNQUANTIZED and linear.bits != setting.weight_bits:
        yield f"{linear.bits}-bit codes"
    if linear.group_size != (setting.group_size or along):
        yield f"groups of {linear.group_size}, not {setting.group_size or along}"
    if (wanted is None) != (linear.activation is None):
        yield f"activations {linear.activation}, not {wanted}"
    if wanted and linear.activation:
        if (wanted.bits, wanted.symmetric) != (linear.activation.bits, linear.activation.symmetric):
            yield f"activations {linear.activation}, not {wanted}"
        if not 0 < linear.activation.clip <= 1:
            yield f"an activation clip of {linear.activation.clip}"
    if setting.symmetric and (linear.zeros != 2 ** (linear.bits - 1)).any():
        yield "zero points other than the middle, though the setting is symmetric"


def unsupported_refused(subject: Subject) -> None:
    """What cannot be done ends with a reason, not with other integers than were asked for.

    To pass: say in `supports` what you cannot do; let the shared quantizer refuse groups that do not divide a layer.
    """
    refused = [s for s in (Setting(), *map(Setting.parse, _TRIED)) if subject.method.supports(s) is not None]
    for setting in refused:
        try:
            subject.run(setting)
        except Unsupported:
            continue
        raise Failed(f"{setting} is unsupported, and yet was run")
    try:
        setting = subject.first_supported("W4A16g13", "W8A16g13", "W2A16g13")  # a prime: no layer is divided by it
    except NotApplicable:
        return
    try:
        linears = subject.run(setting).quantized.linears
    except HarnessError:
        return
    except Exception as error:
        raise Failed(f"groups of 13 were refused with {type(error).__name__}: {error}, not a HarnessError") from error
    sizes = sorted({linear.group_size for linear in linears.values()})
    raise Failed(f"groups of 13 divide no layer; instead of refusing them the method took groups of {sizes}")
