"""``python -m harness.contract``: docs/method-contract.md, from the docstrings of the code that it describes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

_HERE = Path(__file__).parent
_DESCRIBED = (
    ("method", ("Method", "QuantizedWindow")),
    ("window", ("Window", "SharedInput", "Stream")),
    ("linear", ("QuantizedLinear", "round_to_nearest", "assemble")),
    ("transform", ("InputTransform", "BlockRotation", "Permutation")),
    ("composition", ("chain",)),
)
_CHECKS = ("interface", "integers", "behaviour")


def document() -> str:
    """The whole page, in Markdown."""
    return "\n".join([
        "# The contract of a method",
        "",
        "Written by `python -m harness.contract` from the docstrings; a test keeps it current.",
        *(line for module, names in _DESCRIBED for line in _module(module, names)),
        "",
        "## What conformance checks",
        "",
        *(line for name in _CHECKS for line in _checks(name)),
        "",
    ])  # fmt: skip


def _module(module: str, names: tuple[str, ...]) -> Iterator[str]:
    tree = ast.parse((_HERE / f"{module}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names:
            yield from ("", f"## `harness.{module}.{node.name}`", "", *_text(node))
            if isinstance(node, ast.FunctionDef):
                yield from ("", "```python", f"{node.name}({ast.unparse(node.args)})", "```")
            else:
                yield from ("", *_members(node))


def _members(node: ast.ClassDef) -> Iterator[str]:
    for statement, follower in zip(node.body, [*node.body[1:], None], strict=True):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                about = ""
                if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
                    about = ": " + " ".join(str(follower.value.value).split())
                yield f"- `{name}: {ast.unparse(statement.annotation)}`{about}"
            case ast.FunctionDef(name=name) if not name.startswith("_"):
                about = " ".join(_text(statement)).replace("  ", " ")
                is_property = any("property" in ast.unparse(d) for d in statement.decorator_list)
                arguments = "" if is_property else f"({ast.unparse(statement.args).removeprefix('self, ')})"
                yield f"- `{name}{arguments.replace('(self)', '()')}`: {about}"


def _checks(name: str) -> Iterator[str]:
    tree = ast.parse((_HERE / "conformance" / f"{name}.py").read_text())
    for node in tree.body:
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if isinstance(node, ast.FunctionDef) and text and "To pass: " in text:
            purpose, how = (" ".join(part.split()) for part in text.split("\n\n")[:2])
            yield f"- **`{node.name}`** {purpose} *{how}*"


def _text(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    return (ast.get_docstring(node) or "").split("\n")


if __name__ == "__main__":
    sys.stdout.write(document())
