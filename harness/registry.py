"""Which methods there are.

Methods are described by reading their source, not by running it: a listing needs no torch, and a file that would
crash on import crashes nobody but the cell that uses it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError, unknown
from harness.specs import Option, Scalar

if TYPE_CHECKING:
    from harness.method import Method

BASELINE = "fp"
_BUILT_IN = Path(__file__).parent / "methods"
# Shared code that decides integers: a change here makes every cell a new one, as a change in the method does.
_DECIDING = (
    "architecture", "attention", "calibration", "driver", "folding", "hessian", "linear", "quantizer",
    "reconstruction", "sequential", "simulation", "transform", "window",
)  # fmt: skip
_BUILDS_ON = re.compile(rb"^from harness\.methods\.(\w+) import", re.MULTILINE)
_KINDS = {"bool": "a boolean", "int": "an integer", "float": "a number", "str": "a word"}


@dataclass(frozen=True)
class MethodInfo:
    """What can be known of a method without running it."""

    name: str
    summary: str
    options: tuple[Option, ...]
    source: str
    """The file; empty for the baseline."""
    sha256: str
    """Of the method's file, the methods it builds on, and the shared code that decides integers with it."""
    class_name: str = ""
    broken: str | None = None
    """Why the file cannot be used, as ``file:line: reason``."""


def describe_methods(extra_paths: Sequence[str] = ()) -> dict[str, MethodInfo]:
    """Built-in methods, the ``fp`` baseline, and those in the files ``extra_paths``, by name."""
    infos = {BASELINE: MethodInfo(BASELINE, "The untouched model.", (), "", _digest(b""))}
    for path in [*sorted(_BUILT_IN.glob("*.py")), *(Path(p).resolve() for p in extra_paths)]:
        infos |= {info.name: info for info in _read(path)}
    return infos


def is_path(method: str) -> bool:
    """Whether a method is named by its file."""
    return method.endswith(".py")


def find_method(method: str, infos: Mapping[str, MethodInfo]) -> MethodInfo:
    """The method of that name or file. Raises HarnessError when there is none or it is broken."""
    if is_path(method):
        path = Path(method).resolve()
        if not path.is_file():
            raise HarnessError(f"method file {method!r} does not exist", fix="check the path")
        found = list(_read(path))
        if len(found) != 1:
            raise HarnessError(f"{method}: {len(found)} methods in one file", fix="one @register class per file")
        info = found[0]
    elif method in infos:
        info = infos[method]
    else:
        raise unknown("method", method, infos, listing="harness list methods")
    if info.broken:
        raise HarnessError(f"method {info.name!r} is broken", where=info.broken, fix="mend the file")
    return info


def create_method(name_or_path: str, options: Mapping[str, Scalar]) -> Method:
    """An instance of the method, which imports its file (and torch)."""
    info = find_method(name_or_path, describe_methods())
    cls = getattr(_import(Path(info.source)), info.class_name)
    method: Method = cls(**options)
    return method


def _import(path: Path) -> object:
    if path.parent == _BUILT_IN:
        return importlib.import_module(f"harness.methods.{path.stem}")
    name = f"harness_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def _digest(source: bytes) -> str:
    total = hashlib.sha256(source)
    for name in sorted(set(_BUILDS_ON.findall(source))):
        total.update(_digest((_BUILT_IN / f"{name.decode()}.py").read_bytes()).encode())
    for name in _DECIDING:
        total.update(hashlib.sha256((Path(__file__).parent / f"{name}.py").read_bytes()).digest())
    return total.hexdigest()


def _read(path: Path) -> Iterator[MethodInfo]:
    source = path.read_bytes()
    digest = _digest(source)
    try:
        tree = ast.parse(source, filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        yield MethodInfo(path.stem, "", (), str(path), digest, broken=f"{path}:{line}: {error}")
        return
    for node in tree.body:
        name = _registered_name(node)
        if name is None or not isinstance(node, ast.ClassDef):
            continue
        summary = (ast.get_docstring(node) or "").strip().split("\n\n")[0].replace("\n", " ")
        try:
            options = tuple(_options(node))
            yield MethodInfo(name, summary, options, str(path), digest, node.name)
        except _NotAnOption as error:
            yield MethodInfo(name, summary, (), str(path), digest, node.name, broken=f"{path}:{error}")


def _registered_name(node: ast.stmt) -> str | None:
    for decorator in getattr(node, "decorator_list", []):
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "register":
            match decorator.args:
                case [ast.Constant(value=str(name))]:
                    return name
    return None


class _NotAnOption(Exception):
    pass


def _options(node: ast.ClassDef) -> Iterator[Option]:
    """The annotated fields of the class body; a string below a field is its help."""
    for i, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        annotation = ast.unparse(statement.annotation)
        if "ClassVar" in annotation:
            continue
        field = statement.target.id
        kind, choices, optional = _kind(statement.annotation, f"{statement.lineno}: {field}")
        try:
            default = ast.literal_eval(statement.value) if statement.value is not None else _missing(statement, field)
        except ValueError:
            raise _NotAnOption(f"{statement.lineno}: the default of {field} is not a literal") from None
        follower = node.body[i + 1] if i + 1 < len(node.body) else None
        match follower:
            case ast.Expr(value=ast.Constant(value=str(text))):
                help_text = " ".join(text.split())
            case _:
                help_text = ""
        yield Option(field, kind, default, choices, optional, help_text)


def _missing(statement: ast.AnnAssign, field: str) -> Scalar:
    raise _NotAnOption(f"{statement.lineno}: {field} has no default")


def _kind(annotation: ast.expr, where: str) -> tuple[str, tuple[Scalar, ...], bool]:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            kind, choices, _ = _kind(left, where)
            return kind, choices, True
        case ast.Name(id=name) if name in _KINDS:
            return _KINDS[name], (), False
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choice):
            values = ast.literal_eval(choice)
            choices = values if isinstance(values, tuple) else (values,)
            return _KINDS[type(choices[0]).__name__], choices, False
    raise _NotAnOption(f"{where} is not a bool, int, float, str or Literal, perhaps with `| None`")
