"""The conformance suite: which checks there are, and what becomes of each on each model."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from harness.conformance import behaviour, integers, interface
from harness.conformance.models import Case
from harness.conformance.subject import Failed, NotApplicable, Subject
from harness.method import Method
from harness.registry import MethodInfo

State = Literal["passed", "failed", "expected", "not applicable"]


@dataclass(frozen=True)
class Check:
    """A plain function that raises :class:`Failed`; its docstring says what it is for and how to pass."""

    function: Callable[[Subject], None]
    on_every_model: bool

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def purpose(self) -> str:
        return inspect.getdoc(self.function).split("\n\n")[0].replace("\n", " ")  # type: ignore[union-attr]

    @property
    def how_to_pass(self) -> str:
        how = inspect.getdoc(self.function).split("\n\n")[1].replace("\n", " ")  # type: ignore[union-attr]
        return how.removeprefix("To pass: ")


CHECKS = (
    Check(interface.interface, False),
    Check(interface.settings_answered, False),
    Check(interface.settings_kept, False),
    Check(interface.unsupported_refused, False),
    Check(integers.codes_within_bits, True),
    Check(integers.honest_bits, True),
    Check(integers.every_layer_quantized, True),
    Check(integers.function_preserved, True),
    Check(integers.runs_as_packed, True),
    Check(integers.reports_layers, True),
    Check(integers.more_bits_are_better, False),
    Check(behaviour.deterministic, True),
    Check(behaviour.order_independent, False),
    Check(behaviour.leaves_the_model_alone, True),
    Check(behaviour.leaves_calibration_alone, True),
    Check(behaviour.leaves_the_process_alone, True),
    Check(behaviour.resumes, True),
    Check(behaviour.says_progress, True),
    Check(behaviour.nan_is_refused, False),
    Check(behaviour.hard_weights, False),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a check on a model."""

    check: str
    model: str
    state: State
    message: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(cases: Iterable[Case]) -> Iterator[tuple[Case, Check]]:
    """Every check on the first model, those that the architecture may matter to on all."""
    for index, case in enumerate(cases):
        yield from ((case, check) for check in CHECKS if check.on_every_model or index == 0)


def examine(subject: Subject, check: Check) -> Outcome:
    """Run one check. An expected failure that does fail is told with its reason."""
    start = time.monotonic()
    state, message = _run(check, subject)
    reason = subject.expected_failures.get(check.name)
    if state == "failed" and reason:
        state, message = "expected", reason
    return Outcome(check.name, subject.case.name, state, message, time.monotonic() - start)


def unexpected_passes(outcomes: Iterable[Outcome], expected_failures: Mapping[str, str]) -> Iterator[str]:
    """Checks that are declared to fail and passed on every model: the declaration is out of date."""
    seen = list(outcomes)
    for name in expected_failures:
        states = {outcome.state for outcome in seen if outcome.check == name}
        if states == {"passed"}:
            yield name


def expected_failures_of(method: Method, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """By check, the reason why the method does not pass it: as the class declares, and ``more``.

    Raises Failed for a check that there is not, or a failure without a reason.
    """
    declared = {**getattr(type(method), "expected_failures", {}), **(more or {})}
    for name, reason in declared.items():
        if name not in {check.name for check in CHECKS}:
            raise Failed(f"expected_failures names {name!r}, which is no check")
        if not str(reason).strip():
            raise Failed(f"expected_failures has no reason for {name!r}")
    return declared


def subjects(
    info: MethodInfo, create: Callable[[], Method], cases: Iterable[Case], expected_failures: Mapping[str, str]
) -> Iterator[tuple[Subject, Check]]:
    """Each check with what it is given; one subject for each model."""
    made: dict[str, Subject] = {}
    for case, check in plan(cases):
        if case.name not in made:
            made.clear()  # the runs on the model before are not needed any more
            made[case.name] = Subject(info, create, case, expected_failures)
        yield made[case.name], check


def _run(check: Check, subject: Subject) -> tuple[State, str]:
    try:
        check.function(subject)
    except Failed as failure:
        return "failed", str(failure)
    except NotApplicable as reason:
        return "not applicable", str(reason)
    except Exception as error:  # noqa: BLE001  # whatever a method raises fails the check
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""
