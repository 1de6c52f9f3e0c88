"""The process that runs the checks: ``python -P -m harness.conformance.child QUESTION``.

It says which check it begins with and what became of it through the pipe of :mod:`harness.events`, so that whoever
watches knows which check was running when the method took the process down.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from harness import processes
from harness.events import Events
from harness.registry import method_class


def main() -> None:
    if not processes.die_with(int(os.environ["HARNESS_SUPERVISOR"])):
        return
    asked, events = json.loads(Path(sys.argv[1]).read_text()), Events.from_environment()
    try:
        _examine(asked, events)
    except BaseException as error:  # noqa: BLE001  # a method that cannot even be made, or leaves with SystemExit
        traceback.print_exc()
        events.send("broken", message="".join(traceback.format_exception(error, limit=-1)).strip())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _examine(asked: dict[str, object], events: Events) -> None:
    from harness.conformance.models import real_case, tiny_cases
    from harness.conformance.suite import examine, expected_failures_of, subjects, unexpected_passes
    from harness.worker import make_deterministic

    make_deterministic(1, 0)
    events.send("begin", check="interface", model="")
    info, create = method_class(str(asked["method"]))
    expected = expected_failures_of(create())
    cases = [*tiny_cases().values()]
    if asked["real"]:
        cases.append(real_case(Path(str(asked["real"]))))
    outcomes = []
    for subject, check in subjects(info, create, cases, expected):
        events.send("begin", check=check.name, model=subject.case.name)
        outcome = examine(subject, check)
        outcomes.append(outcome)
        events.send("outcome", **outcome.as_json())
    events.send(
        "end", unexpected=list(unexpected_passes(outcomes, expected)), peak_bytes=processes.peak_resident_bytes()
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
