"""Which methods there are: built-in, installed (entry points of the group ``harness.methods``), or named by a file.

Methods are described by reading their source, not by running it: a listing needs no torch, and a file that would
crash on import crashes nobody but the cell that uses it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from harness.environment import allowed
from harness.errors import HarnessError, unknown
from harness.specs import Option, Scalar, Spec, bind

if TYPE_CHECKING:
    from harness.method import Method

BASELINE = "fp"
ENTRY_POINTS = "harness.methods"
_BUILT_IN = Path(__file__).parent / "methods"
# Shared code that decides integers: a change here makes every cell a new one, as a change in the method does.
_DECIDING = (
    "architecture", "attention", "calibration", "composition", "driver", "folding", "hessian", "linear", "quantizer",
    "reconstruction", "sequential", "simulation", "transform", "window",
)  # fmt: skip
_BUILDS_ON = re.compile(rb"^from harness\.methods\.(\w+) import", re.MULTILINE)
_IMPORT_SECONDS = 120
_KINDS = {"bool": "a boolean", "int": "an integer", "float": "a number", "str": "a word"}


@dataclass(frozen=True)
class Workspace:
    """What a method holds at most beside the weights of its window; a class says it as ``workspace = {…}``.

    The defaults are those of a method that does not say: high.
    """

    weights: float = 6.0
    """Float32 copies of the window's weights; counted where they are more than the squares."""
    squares: float = 8.0
    """Float32 matrices as wide and high as the widest linear has inputs: Hessians, their factors."""
    streams: int = 2
    """Calibration streams that it walks; 0: it looks at none."""
    options: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What some options, where they are on, add to the three above."""

    def given(self, options: Mapping[str, Scalar]) -> Workspace:
        """With these options."""
        extra = [more for name, more in self.options.items() if options.get(name)]
        return Workspace(
            self.weights + sum(more.get("weights", 0) for more in extra),
            self.squares + sum(more.get("squares", 0) for more in extra),
            self.streams + int(sum(more.get("streams", 0) for more in extra)),
        )


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
    module: str = ""
    """What to import; empty for a file that belongs to no package."""
    workspace: Workspace = field(default_factory=Workspace)
    broken: str | None = None
    """Why the file cannot be used, as ``file:line: reason``."""


def describe_methods(extra_paths: Sequence[str] = ()) -> dict[str, MethodInfo]:
    """The ``fp`` baseline, built-in and installed methods, and those in the files ``extra_paths``, by name.

    ``HARNESS_METHODS=rtn,mine`` leaves only those (and the baseline). Raises HarnessError for a name in it that there
    is not.
    """
    infos = {BASELINE: MethodInfo(BASELINE, "The untouched model.", (), "", _digest(b""))}
    for path in sorted(_BUILT_IN.glob("*.py")):
        infos |= {info.name: info for info in _read(path, f"harness.methods.{path.stem}")}
    for info in _installed():
        if info.name in infos:
            taken = f"the name {info.name!r} is taken by {infos[info.name].source}: register it under another"
            info = replace(info, name=f"{info.name} of {info.module}", broken=taken)
        infos[info.name] = info
    for extra in extra_paths:
        infos |= {info.name: info for info in _read(Path(extra).resolve())}
    return _narrowed(infos, os.environ.get("HARNESS_METHODS"))


def _narrowed(infos: dict[str, MethodInfo], names: str | None) -> dict[str, MethodInfo]:
    if names is None:
        return infos
    wanted = [BASELINE, *(name.strip() for name in names.split(",") if name.strip())]
    for name in wanted:
        if name not in infos:
            raise unknown("method in HARNESS_METHODS", name, infos, listing="HARNESS_METHODS= harness list methods")
    return {name: info for name, info in infos.items() if name in wanted}


def _installed() -> Iterator[MethodInfo]:
    """Methods that other packages bring along. Their code is read, not run."""
    for point in entry_points(group=ENTRY_POINTS):
        path = _source_of(point.module)
        if path is None:
            broken = f"its package names the module {point.module!r}, which there is not"
            yield MethodInfo(point.name, "", (), "", _digest(b""), module=point.module, broken=broken)
            continue
        found = [info for info in _read(path, point.module) if point.attr in ("", info.class_name) or info.broken]
        if not found:
            broken = f"{path}:1: there is no @register class{f' {point.attr}' if point.attr else ''}"
            yield MethodInfo(point.name, "", (), str(path), _digest(b""), module=point.module, broken=broken)
        yield from found


def _source_of(module: str) -> Path | None:
    """The file of a module, found without running the packages that it lies in."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    if not inner:
        return Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        for path in (Path(folder, *inner).with_suffix(".py"), Path(folder, *inner, "__init__.py")):
            if path.is_file():
                return path
    return None


def import_failure(info: MethodInfo) -> str | None:
    """The traceback with which importing the method ends, None if it does not. Tried in a process of its own."""
    code = "import sys; from harness.registry import import_method, MethodInfo; import_method(*sys.argv[1:])"
    words = [sys.executable, "-P", "-c", code, info.source, info.module]
    done = subprocess.run(
        words, env=allowed(), capture_output=True, text=True, check=False, timeout=_IMPORT_SECONDS
    )  # fmt: skip
    return None if done.returncode == 0 else done.stderr.strip() or f"it left with exit code {done.returncode}"


def is_path(method: str) -> bool:
    """Whether a method is named by its file."""
    return method.endswith(".py")


def find_method(method: str, infos: Mapping[str, MethodInfo]) -> MethodInfo:
    """The method of that name or file. Raises HarnessError when there is none or it is broken."""
    if is_path(method):
        try:
            path = Path(method).resolve()
            there = path.is_file()
        except (OSError, ValueError):  # too long; a zero byte
            there = False
        if not there:
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
    cls = getattr(import_method(info.source, info.module), info.class_name)
    method: Method = cls(**options)
    return method


def method_class(text: str) -> tuple[MethodInfo, Callable[[], Method]]:
    """What is known of the method ``name:option=value`` (or ``file.py:option=value``), and how to make one."""
    spec = Spec.parse(text)
    info = find_method(spec.name, describe_methods())
    refuse_baseline(info)
    options = bind(info.options, Spec(info.name, spec.options))
    return info, partial(getattr(import_method(info.source, info.module), info.class_name), **options)


def refuse_baseline(info: MethodInfo) -> None:
    """Raises HarnessError for what is listed with the methods and quantizes nothing."""
    if not info.class_name:
        raise HarnessError(
            f"{info.name!r} is the baseline, not a method", fix="`harness list methods` shows the methods"
        )


def import_method(source: str, module: str) -> object:
    """Run the method's file: as ``module`` of its package, or on its own."""
    if module:
        return importlib.import_module(module)
    name = f"harness_method_{Path(source).stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


@cache
def _digest(source: bytes) -> str:
    total = hashlib.sha256(source)
    for name in sorted(set(_BUILDS_ON.findall(source))):
        total.update(_digest((_BUILT_IN / f"{name.decode()}.py").read_bytes()).encode())
    for name in _DECIDING:
        total.update(hashlib.sha256((Path(__file__).parent / f"{name}.py").read_bytes()).digest())
    return total.hexdigest()


def _read(path: Path, module: str = "") -> Iterator[MethodInfo]:
    source = path.read_bytes()
    digest = _digest(source if module.startswith("harness.") or "." not in module else _whole_package(path))
    try:
        tree = ast.parse(source, filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        yield MethodInfo(path.stem, "", (), str(path), digest, module=module, broken=f"{path}:{line}: {error}")
        return
    for node in tree.body:
        name = _registered_name(node)
        if name is None or not isinstance(node, ast.ClassDef):
            continue
        summary = (ast.get_docstring(node) or "").strip().split("\n\n")[0].replace("\n", " ")
        try:
            options = tuple(_options(node))
            yield MethodInfo(name, summary, options, str(path), digest, node.name, module, _workspace(node))
        except _NotAnOption as error:
            broken = f"{path}:{error}"
            yield MethodInfo(name, summary, (), str(path), digest, node.name, module, broken=broken)


def _whole_package(path: Path) -> bytes:
    """The source of a module that lies in a package of its own, with that of its neighbours."""
    return b"\n".join(file.read_bytes() for file in [path, *sorted(set(path.parent.glob("*.py")) - {path})])


def _registered_name(node: ast.stmt) -> str | None:
    for decorator in getattr(node, "decorator_list", []):
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "register":
            match decorator.args:
                case [ast.Constant(value=str(name))]:
                    return name
    return None


def _workspace(node: ast.ClassDef) -> Workspace:
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id="workspace"), value=ast.expr() as value):
                said = value
            case ast.Assign(targets=[ast.Name(id="workspace")], value=value):
                said = value
            case _:
                continue
        try:
            return Workspace(**ast.literal_eval(said))
        except (ValueError, TypeError):
            raise _NotAnOption(
                f"{statement.lineno}: workspace is not a dictionary of {', '.join(Workspace.__dataclass_fields__)}"
            ) from None
    return Workspace()


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
