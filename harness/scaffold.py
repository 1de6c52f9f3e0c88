"""``harness methods new``: a package with one method that works at once, or only its file."""

from __future__ import annotations

import re
from pathlib import Path

from harness import atomic
from harness.errors import HarnessError, Problems
from harness.registry import describe_methods

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def write_method(name: str, folder: Path, *, only_file: bool) -> list[Path]:
    """Write the method ``name`` below ``folder`` and return the files.

    Raises HarnessError for a name that is none or taken, Problems for files that are there already: nothing is
    overwritten.
    """
    if not _NAME.fullmatch(name):
        raise HarnessError(
            f"{name!r} is no name for a method", fix="lower-case letters, digits, underscores: my_method"
        )
    if name in describe_methods():
        raise HarnessError(f"there is a method {name!r} already", fix="choose another name")
    files = _files(name, only_file=only_file)
    taken = [HarnessError(f"{path} is there already", fix="move it away") for path in files if (folder / path).exists()]
    if taken:
        raise Problems(taken)
    for path, template in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / path, _filled(template, name))
    return [folder / path for path in files]


def _files(name: str, *, only_file: bool) -> dict[str, str]:
    """Each file's path, with the template it is made from."""
    if only_file:
        return {f"{name}.py": "method.py.txt"}
    root = f"harness-{name.replace('_', '-')}"
    return {
        f"{root}/pyproject.toml": "pyproject.toml.txt",
        f"{root}/README.md": "README.md.txt",
        f"{root}/src/harness_{name}/__init__.py": "init.py.txt",
        f"{root}/src/harness_{name}/method.py": "method.py.txt",
        f"{root}/tests/test_{name}.py": "test.py.txt",
        f"{root}/.github/workflows/conformance.yml": "conformance.yml.txt",
    }


def _filled(template: str, name: str) -> str:
    text = (_TEMPLATES / template).read_text()
    words = {
        "NAME": name,
        "CLASS": "".join(part.capitalize() for part in name.split("_")),
        "DIST": name.replace("_", "-"),
    }
    return re.sub(r"@@(\w+)@@", lambda match: words[match[1]], text)
