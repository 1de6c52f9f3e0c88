"""Names as text, whatever they hold: nothing that a name contains may become markup, a formula or a reversed line."""

from __future__ import annotations

import re
import unicodedata

_PLAIN = re.compile(r"[A-Za-z0-9. ]*").fullmatch  # most of a table is numbers
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "–": "--", "×": r"$\times$", "…": r"\dots{}",
    "-": "{-}", ",": "{,}", "?": "?{}", "!": "!{}", "[": "{[}", "]": "{]}", "*": "{*}", "=": "{=}",
}  # fmt: skip


def visible(text: str, longest: int | None = None) -> str:
    """The text on one line, with characters that are not seen (controls, changes of direction) as their code points.

    Past ``longest`` characters the middle is left out.
    """
    shown = text if text.isprintable() else "".join(map(_visible, text))
    if longest is not None and len(shown) > longest:
        return shown[: longest // 2] + "…" + shown[-(longest // 2 - 1) :]
    return shown


def _visible(char: str) -> str:
    if char in "\n\r\t":
        return " "
    return f"‹U+{ord(char):04X}›" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char


def latex(text: str, longest: int | None = None) -> str:
    """For a LaTeX document with T1 fonts: characters that those fonts lack become their code points."""
    shown = visible(text, longest)
    return shown if _PLAIN(shown) else "".join(map(_latex, shown))


def _latex(char: str) -> str:
    in_t1 = char.isascii() or ("\u00c0" <= char <= "\u00ff" and char != "÷")
    return _LATEX.get(char) or (char if in_t1 else rf"\texttt{{U+{ord(char):04X}}}")
