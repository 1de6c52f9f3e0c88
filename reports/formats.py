"""A board written down: for a terminal, GitHub, a paper, a spreadsheet, a page."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harness.reports.board import Board, Column, Line, Place
from harness.reports.words import latex, visible
from harness.results import csv_value
from harness.tables import escaped

LONGEST = 80  # characters of a name in a table for people; files for programs have all of it
_STYLES = {"best": "bold", "second": "underline", "": ""}
_LEGEND = "bold: best, and all that cannot be told from it; underlined: the next; ±: half the 95% interval"


def terminal(boards: Sequence[Board]) -> RenderableType:
    parts: list[RenderableType] = []
    for board in boards:
        title = Text(visible(board.model, LONGEST), style="bold") + Text(f"\n{visible(board.terms)}", style="dim")
        table = Table(title=title, title_justify="left", caption=Text(caption(board)), caption_justify="left")
        for at, name in enumerate(board.header):
            table.add_column(Text(visible(name, LONGEST)), justify="left" if at < 2 else "right", overflow="fold")
        for _, lines in board.sections:
            for line in lines:
                places = [Text(place.words, style=_STYLES[place.mark]) for place in line.places]
                table.add_row(*map(Text, _head(line)), *places)
            table.add_section()
        parts.append(table)
    return Group(*parts)


def markdown(boards: Sequence[Board]) -> str:
    """GitHub's tables. Markdown has no underline, so the second best are in italics."""
    parts = []
    for board in boards:
        rows = [_markdown_row(map(escaped, board.header)), "| --- | --- |" + " ---: |" * (len(board.header) - 2)]
        for line in board.lines:
            places = [_emphasized(place) for place in line.places]
            rows.append(_markdown_row([*map(escaped, _head(line)), *places]))
        below = escaped(caption(board).replace("underlined", "italics"))
        title = f"**{escaped(visible(board.model, LONGEST))}** · {escaped(visible(board.terms))}"
        parts.append(f"{title}\n\n" + "\n".join(rows) + f"\n\n{below}\n")
    return "\n".join(parts)


def latex_tables(boards: Sequence[Board]) -> str:
    """``table`` environments; the document needs ``booktabs``, ``textcomp`` and T1 fonts, as the first line says."""
    head = "% \\usepackage[T1]{fontenc} \\usepackage[utf8]{inputenc} \\usepackage{textcomp,booktabs,graphicx}\n"
    return head + "\n".join(map(_latex_table, boards))


def latex_document(boards: Sequence[Board]) -> str:
    """A document of the tables alone, which compiles."""
    return (
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage[utf8]{inputenc}\n"
        "\\usepackage{textcomp,booktabs,graphicx}\n\\usepackage[landscape,margin=1cm]{geometry}\n\\begin{document}\n"
        + latex_tables(boards)
        + "\\end{document}\n"
    )


def csv_text(boards: Sequence[Board]) -> str:
    """One table of all boards: each number beside the ends of its interval, so that nothing need be parsed."""
    columns = list(dict.fromkeys(column.title for board in boards for column in board.columns))
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    numbers = [name for column in columns for name in (column, f"{column} low", f"{column} high", f"{column} mark")]
    header = ("model", "terms", "cell", "method", "setting", "bits/weight", *numbers)
    writer.writerow([csv_value(name) for name in header])
    for board in boards:
        for line in board.lines:
            places = {column.title: place for column, place in zip(board.columns, line.places, strict=True)}
            row: list[object] = [board.model, board.terms, line.cell, line.method, line.setting, line.bits]
            for name in columns:
                place = places.get(name, Place("not asked"))
                row.extend([place.text if place.value is None else place.value, place.low, place.high, place.mark])
            writer.writerow([csv_value(value) for value in row])
    return stream.getvalue()


def _head(line: Line) -> tuple[str, str, str]:
    return visible(line.method, LONGEST), visible(line.setting, LONGEST), line.bits


def caption(board: Board) -> str:
    """What a reader must know of the table."""
    return "; ".join((_LEGEND, *board.notes) if board.ranked else board.notes)


def _emphasized(place: Place) -> str:
    text = escaped(place.text)
    marked = {"best": f"**{text}**", "second": f"*{text}*", "": text}[place.mark]
    return f"{marked} ± {place.half}" if place.half else marked


def _markdown_row(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _latex_table(board: Board) -> str:
    align = "llr" + "r@{\\,}l" * len(board.columns)  # numbers end and their intervals begin at one line
    header = " & ".join(["method", "setting", "bits/weight", *map(_latex_header, board.columns)])
    sections = [" \\\\\n".join(map(_latex_row, lines)) + " \\\\\n" for _, lines in board.sections]
    below = caption(board)
    title = f"{latex(board.model, LONGEST)}; {latex(board.terms)}. {latex(below[:1].upper() + below[1:])}."
    return (
        f"\\begin{{table}}[tp]\n\\centering\n\\caption{{{title}}}\n\\vspace{{1ex}}\n\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth"
        f"\\else\\width\\fi}}{{!}}{{%\n\\begin{{tabular}}{{{align}}}\n\\toprule\n{header} \\\\\n\\midrule\n"
        + "\\midrule\n".join(sections)
        + "\\bottomrule\n\\end{tabular}}\n\\end{table}\n"
    )


def _latex_header(column: Column) -> str:
    """The parts of a column's name below one another: a task's name is long, its numbers are not."""
    task, *options = visible(column.task, LONGEST).split(":")
    lines = [latex(task), *(rf"{{\scriptsize {latex(option)}}}" for option in options)]
    if column.metric:
        lines.append(latex(f"{visible(column.metric, LONGEST).replace('_', ' ')} {column.arrow}".strip()))
    return r"\multicolumn{2}{r}{\begin{tabular}[b]{@{}r@{}}" + r"\\".join(lines) + r"\end{tabular}}"


def _latex_row(line: Line) -> str:
    return " & ".join([*(latex(text, LONGEST) for text in _head(line)), *map(_latex_place, line.places)])


def _latex_place(place: Place) -> str:
    text = latex(place.text)
    if place.value is None:  # a word stands where number and interval would
        return rf"\multicolumn{{2}}{{r}}{{{text}}}"
    marked = {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}", "": text}[place.mark]
    return f"{marked} & {{\\scriptsize $\\pm$ {latex(place.half)}}}" if place.half else f"{marked} &"
