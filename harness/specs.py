"""Names with options, as typed on the command line: ``gptq:act_order=false:damp=0.05``, ``wikitext2:windows=16``."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.errors import HarnessError

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Spec:
    """A name and its options, still as text."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read ``name:key=value:…``. Raises HarnessError for a part without ``=`` or an option given twice."""
        name, *parts = text.split(":")
        options: dict[str, str] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise HarnessError(f"{text!r}: the part {part!r} is not key=value", fix=f"write {name}:key=value")
            if key in options:
                raise HarnessError(f"{text!r}: option {key!r} is given twice", fix="give it once")
            options[key] = value
        return cls(name, tuple(options.items()))


@dataclass(frozen=True)
class Option:
    """One option that something takes: its name, its type in words, its default."""

    name: str
    kind: str
    default: Scalar
    choices: tuple[Scalar, ...] = ()
    optional: bool = False
    help: str = ""

    def convert(self, text: str, *, of: str) -> Scalar:
        """The value that ``text`` stands for. Raises HarnessError that names the legal values."""
        if self.optional and text.lower() == "none":
            return None
        try:
            value: Scalar = _READERS[self.kind](text)
        except ValueError:
            raise HarnessError(
                f"{of}: option {self.name}={text!r} is not {self.kind}",
                fix=f"default: {self.name}={show(self.default)}",
            ) from None
        if self.choices and value not in self.choices:
            raise HarnessError(
                f"{of}: option {self.name}={text!r} is not offered",
                fix=f"choose from {', '.join(show(c) for c in self.choices)}",
            )
        return value


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a frozen dataclass: its fields, whose types are bool, int, float, str, Literal, or ``… | None``.

    A field's ``metadata["help"]`` is its one-line help. Raises HarnessError for a field of another type or without
    a default.
    """
    hints = typing.get_type_hints(cls)
    return tuple(_option(cls, field, hints[field.name]) for field in dataclasses.fields(cls) if field.init)


def bind(options: tuple[Option, ...], spec: Spec) -> dict[str, Scalar]:
    """``spec``'s options converted, defaults left out. Raises HarnessError naming the options there are."""
    known = {option.name: option for option in options}
    values: dict[str, Scalar] = {}
    for key, text in spec.options:
        if key not in known:
            raise HarnessError(
                f"{spec.name}: unknown option {key!r}",
                fix=f"{spec.name} takes {', '.join(known)}" if known else f"{spec.name} takes no options",
            )
        value = known[key].convert(text, of=spec.name)
        if value != known[key].default:
            values[key] = value
    return values


def canonical(name: str, options: Mapping[str, Scalar]) -> str:
    """One spelling for a name with options: sorted, defaults left out by :func:`bind`."""
    return ":".join([name, *(f"{key}={show(options[key])}" for key in sorted(options))])


def show(value: Scalar) -> str:
    return "true" if value is True else "false" if value is False else "none" if value is None else str(value)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError(text)


_READERS: dict[str, Any] = {"a boolean": _boolean, "an integer": int, "a number": float, "a word": str}
_KINDS: dict[Any, str] = {bool: "a boolean", int: "an integer", float: "a number", str: "a word"}


def _option(cls: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        hint = inner[0] if len(inner) == 1 else hint
    choices: tuple[Scalar, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    if hint not in _KINDS or field.default is dataclasses.MISSING:
        raise HarnessError(
            f"{cls.__name__}.{field.name} cannot be an option",
            fix="a field is a bool, int, float, str or Literal of those, perhaps `| None`, and has a default",
        )
    return Option(field.name, _KINDS[hint], field.default, choices, optional, field.metadata.get("help", ""))
