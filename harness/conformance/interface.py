"""Checks of what a method says about itself. They need no model, or only the first."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.conformance.subject import Failed, NotApplicable, Subject
from harness.errors import BadOutput, HarnessError, Unsupported
from harness.settings import ACTIVATION_BITS, WEIGHT_BITS, Setting

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
    """A setting that is supported is what comes out: bits, groups, symmetry, activations, keys and values as asked.

    To pass: take the format from `WeightFormat.of(setting)` and the activations from `ActivationSpec.of(setting)`
    (`round_to_nearest` and `assemble` do both), and name in `supports` the settings that you cannot do.
    """
    for setting in map(Setting.parse, _TRIED):
        if subject.method.supports(setting) is not None:
            continue
        try:
            subject.at(setting)  # the driver holds what comes out against the setting (`harness.terms`)
        except Exception as error:  # whatever it raises is the finding
            raise Failed(f"{setting} is said to be supported, but: {type(error).__name__}: {error}") from error


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
        subject.run(setting)
    except BadOutput as error:  # the driver's word, not the method's
        raise Failed(
            f"groups of 13 divide no layer; instead of refusing them the method went on: {error.what}"
        ) from error
    except HarnessError:
        return
    except Exception as error:
        raise Failed(f"groups of 13 were refused with {type(error).__name__}: {error}, not a HarnessError") from error
    raise Failed("groups of 13 divide no layer, and yet there are integers")
