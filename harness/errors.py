"""The one kind of error a user sees: what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class HarnessError(Exception):
    """A mistake that the user can mend. ``str()`` is the whole message, one line a part."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


class Problems(HarnessError):
    """Several mistakes, told at once."""

    def __init__(self, problems: Sequence[HarnessError]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(
            f"{count} problem{'s' if count != 1 else ''}, nothing was run:\n"
            + "\n".join(str(problem) for problem in self.problems)
        )


class Unsupported(HarnessError):
    """This combination cannot be run, and no code change of the user's would help: status ``unsupported``."""


class BadOutput(HarnessError):
    """A computation produced numbers that must not become a score (NaN, infinity, wrong precision)."""


class Infrastructure(HarnessError):
    """The machine failed, not the method (disk full, download cut): status ``infra``."""


def unknown(kind: str, name: str, known: Iterable[str], *, listing: str) -> HarnessError:
    """The error for a name that is not known, with the nearest names that are."""
    close = difflib.get_close_matches(name, list(known), n=3)
    meant = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return HarnessError(f"unknown {kind} {name!r}", fix=f"{meant}`{listing}` shows what there is")
