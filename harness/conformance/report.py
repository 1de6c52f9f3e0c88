"""What ``harness methods check`` prints: a line for each check, and what to do about those that failed."""

from __future__ import annotations

import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.conformance.running import Verdict, check_methods
from harness.errors import HarnessError
from harness.limits import Limits, show_bytes
from harness.presets import resolve_model
from harness.registry import describe_methods, find_method, refuse_baseline
from harness.specs import Spec, bind

_REAL = "smollm2-135m"
_WORST_FIRST = ("failed", "expected", "passed", "not applicable")


def examine(methods: Sequence[str], *, full: bool, limits: Limits) -> bool:
    """Run the suite on each method and print what it finds. Returns whether all passed.

    Raises HarnessError for an unknown method or option, before anything heavy is imported, and Interrupted.
    """
    known = describe_methods()
    for method in methods:
        spec = Spec.parse(method)
        info = find_method(spec.name, known)
        refuse_baseline(info)
        bind(info.options, Spec(info.name, spec.options))
    passed = []
    for verdict in check_methods(methods, real=_real_model() if full else None, limits=limits, on_event=_say):
        _print(verdict)
        passed.append(verdict.passed)
    return all(passed)


def _real_model() -> Path:
    path = resolve_model(_REAL).path
    if path is None:
        raise HarnessError(f"{_REAL} is not on this machine", fix=f"harness models fetch {_REAL}")
    return path


def _say(method: str, event: Mapping[str, Any]) -> None:
    if event.get("event") == "outcome" and sys.stderr.isatty():
        print(f"{method}: {event['state']} {event['check']} on {event['model']}", file=sys.stderr)


def _print(verdict: Verdict) -> None:
    print(f"{verdict.method}\n")
    checks: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in verdict.rows:
        checks[row["check"]].append(row)
    for check, rows in checks.items():
        state = min((row["state"] for row in rows), key=_WORST_FIRST.index)
        worst = next(row for row in rows if row["state"] == state)
        seconds = sum(row["seconds"] for row in rows)
        note = f"  ({worst['message']})" if state in ("expected", "not applicable") else ""
        print(f"{state:>14}  {check}, {len(rows)} model{'s' if len(rows) > 1 else ''}, {seconds:.1f} s{note}")
    failures = [row for row in verdict.rows if row["state"] == "failed"]
    for row in failures:
        print(f"\nFAILED {row['check']}" + (f" on {row['model']}" if row["model"] else ""))
        print(f"  found:   {row['message'].strip()}")
        for words in _about(row["check"]):
            print(f"  {words}")
    peak = f", {show_bytes(verdict.peak_bytes)} at most" if verdict.peak_bytes else ""
    counts = Counter(row["state"] for row in verdict.rows)
    told = ", ".join(f"{counts[state]} {state}" for state in ("passed", "expected", "not applicable", "failed"))
    print(f"\n{told} in {verdict.seconds:.0f} s{peak}\n", flush=True)
    if failures and verdict.log.strip():
        print(f"What {verdict.method} said (the end of it):\n{verdict.log.strip()[-3000:]}\n", flush=True)


def _about(check: str) -> list[str]:
    """What a check is for and how to pass it, from its docstring, read where the heavy half need not be imported."""
    import ast

    for name in ("interface", "integers", "behaviour"):
        tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == check:
                purpose, how = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[:2]
                return [f"why:     {' '.join(purpose.split())}", f"to pass: {' '.join(how.split())[9:]}"]
    return []
