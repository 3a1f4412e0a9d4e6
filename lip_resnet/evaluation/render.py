"""Any table as Markdown, CSV or LaTeX."""

import csv
import io
import re
from collections.abc import Sequence

STYLES = ("md", "csv", "latex")


_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "%_&#${}"}
    | {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
"""Letters of cells that LaTeX reads as commands, and how they are written."""


_NUMBER = re.compile(r"([-+]?[\d,]+)((?:\..*)?)", re.DOTALL)
"""A cell that begins with a number: what stands before its decimal point, and the rest."""


class Measured(str):
    """A cell of a table, such as 98.50 ± 0.71 (+2.00): in ``csv`` its numbers are columns of their own.

    Args:
        mean, deviation: over the seeds; no deviation of one.
        delta: to the baseline, as text.
        seeds: how many; None where the table has a column for them.
    """

    parts: dict[str, str]
    """Ending of a column's name -> its text."""

    def __new__(
        cls, mean: float, deviation: float | None, delta: str | None = None, seeds: int | None = None
    ) -> "Measured":
        text = f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}") + (f" ({delta})" if delta else "")
        cell = super().__new__(cls, text)
        cell.parts = {"": f"{mean:.2f}", " std": "" if deviation is None else f"{deviation:.2f}"}
        cell.parts |= {" delta": delta} if delta else {}
        cell.parts |= {" seeds": str(seeds)} if seeds else {}
        return cell


def _split_measured(lines: list[Sequence[str]]) -> list[list[str]]:
    """Header and rows, with a column for every number of ``Measured`` cells, and empty cells where there is none."""
    split: list[list[str]] = [[] for _ in lines]
    for column, name in enumerate(lines[0]):
        cells = [line[column] for line in lines[1:]]
        present = {ending for cell in cells if isinstance(cell, Measured) for ending in cell.parts}
        endings = [ending for ending in ("", " std", " delta", " seeds") if ending in present] or [""]
        title = name.removesuffix(" (%)")
        split[0] += [name, *(title + ending for ending in endings if ending)]
        for line, cell in zip(split[1:], cells, strict=True):
            parts = cell.parts if isinstance(cell, Measured) else {"": "" if cell == "-" else cell}
            line += [parts.get(ending, "") for ending in endings]
    return split


def render(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), style: str = "md") -> str:
    """A table as text that ends in a newline.

    Args:
        header: names of the columns; the first column is aligned left, all others right.
        rows: each with one cell for each column.
        notes: lines below the table: plain in ``md``, comments in ``latex``, omitted in ``csv``, where every number
            of a ``Measured`` cell is a column of its own.
        style: one of ``STYLES``.
    """
    lines: list[Sequence[str]] = [header, *rows]
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(_split_measured(lines))
        return buffer.getvalue()
    if style == "latex":
        return _latex(lines, notes)
    header, *rows = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    lines = [header, *rows]
    widths = [max(2, *(len(line[column]) for line in lines)) for column in range(len(header))]  # ":" is no rule
    rule = ["-" * (widths[0])] + ["-" * (width - 1) + ":" for width in widths[1:]]
    table = []
    for line in [header, rule, *rows]:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        table.append("| " + " | ".join([line[0].ljust(widths[0]), *numbers]) + " |")
    return "\n".join([*table, "", *notes]).rstrip() + "\n"


def _latex(lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table for the LaTeX package booktabs: text on the left, numbers aligned at their decimal points."""
    alignment, columns = "", []
    for number, cells in enumerate(zip(*lines, strict=True)):
        title, *rest = (cell.translate(_LATEX) for cell in cells)
        parts = [_NUMBER.fullmatch(cell) for cell in rest]
        if number == 0 or not any(parts):
            alignment += "l"
            columns.append([title, *rest])
            continue
        split = [
            (each[1].replace("-", "$-$"), each[2]) if each else (cell, "")
            for each, cell in zip(parts, rest, strict=True)
        ]
        if len({len(after) for before, after in split if before != "-"}) == 1:
            alignment += "r"
            columns.append([title, *(before + after for before, after in split)])
        else:
            alignment += "r@{}l"
            columns.append([rf"\multicolumn{{2}}{{c}}{{{title}}}", *(f"{before} & {after}" for before, after in split)])
    rows = [" & ".join(cells) + r" \\" for cells in zip(*columns, strict=True)]
    body = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    comments = [r"% \usepackage{booktabs}", *(f"% {note}" for note in notes)]
    return "\n".join([*body, r"\end{tabular}", *comments]) + "\n"
