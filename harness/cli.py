"""The command line: its groups of commands, and how it ends."""

from __future__ import annotations

import io
import os
import sys

import typer

from harness.commands import kernels, machine, methods, reports, results, run
from harness.commands.shared import FAILED, WRONG_USE
from harness.errors import HarnessError, Infrastructure

app = typer.Typer(
    name="harness",
    help="Compare post-training quantization methods for language models on equal terms.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)
for group in (run, results, reports, kernels, machine, methods):
    app.add_typer(group.app)


def main() -> None:
    """The entry point: a mistake of the user's is told plainly, and a closed stdout is no error."""
    _speak_utf8()
    try:
        app()
    except Infrastructure as error:
        _quit(str(error), FAILED)
    except HarnessError as error:
        _quit(str(error), WRONG_USE)
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _speak_utf8() -> None:
    """A file or a pipe gets the same bytes whatever the locale; a terminal may show question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def _quit(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
