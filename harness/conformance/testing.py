"""The conformance suite as one parametrized pytest test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def conformance_tests(method: str, expected_failures: Mapping[str, str] | None = None) -> Callable[..., None]:
    """A test for each check and model: ``test_mine = conformance_tests("mine:option=value")``, or a file's path.

    Checks named in ``expected_failures`` (by name, the reason) have to fail somewhere.
    """
    import pytest

    from harness.conformance.models import tiny_cases
    from harness.conformance.subject import Subject
    from harness.conformance.suite import CHECKS, Outcome, examine, expected_failures_of, plan, unexpected_passes
    from harness.registry import method_class

    cases, checks = tiny_cases(), {check.name: check for check in CHECKS}
    made: dict[str, Any] = {}  # the subject of the model that is being looked at, and what became of its checks
    outcomes: list[Outcome] = []

    def subject(case: str) -> Subject:
        if case not in made:
            made.clear()
            info, create = method_class(method)
            made[case] = Subject(info, create, cases[case], expected_failures_of(create(), expected_failures))
        found: Subject = made[case]
        return found

    pairs = [(case.name, check.name) for case, check in plan(cases.values())]

    @pytest.mark.parametrize(("case", "check"), [*pairs, ("", "")], ids=[*map("-".join, pairs), "declared failures"])
    def test(case: str, check: str) -> None:
        if not case:
            assert not list(unexpected_passes(outcomes, expected_failures or {})), "expected to fail, and pass"
            return
        outcome = examine(subject(case), checks[check])
        outcomes.append(outcome)
        if outcome.state == "failed":
            pytest.fail(f"{outcome.message}\n{checks[check].purpose}\nto pass: {checks[check].how_to_pass}", False)
        if outcome.state != "passed":
            pytest.skip(outcome.message)

    return test
