"""A table of text as Markdown, CSV or LaTeX."""

import csv
import io
from collections.abc import Sequence

STYLES = ("md", "csv", "latex")


def render(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), style: str = "md") -> str:
    """A table as text that ends in a newline.

    Args:
        header: the columns' names; the first column is aligned left, all others right.
        rows: of as many cells.
        notes: lines below the table: plain in ``md``, comments in ``latex``, left out in ``csv``.
        style: one of ``STYLES``.
    """
    lines = [header, *rows]
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(lines)
        return buffer.getvalue()
    if style == "latex":
        escape = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$"})
        body = [" & ".join(cell.translate(escape) for cell in line) + r" \\" for line in lines]
        body = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\hline", body[0], r"\hline", *body[1:]]
        return "\n".join([*body, r"\hline", r"\end{tabular}", *(f"% {note}" for note in notes)]) + "\n"
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * (widths[0])] + ["-" * (width - 1) + ":" for width in widths[1:]]
    table = []
    for line in [header, rule, *rows]:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        table.append("| " + " | ".join([line[0].ljust(widths[0]), *numbers]) + " |")
    return "\n".join([*table, "", *notes]).rstrip() + "\n"
