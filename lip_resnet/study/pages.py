"""Pages of text, tables and figures, as Markdown or as one HTML file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from lip_resnet.evaluation.render import render


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then what it has."""

    title: str
    text: tuple[str, ...] = ()
    """Paragraphs; ``**bold**`` is the one mark."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Header and rows."""
    figures: tuple[tuple[str, str, str], ...] = ()
    """Of each: file name without .svg, alternative text, SVG."""


def format_interval(interval: tuple[float, float] | None) -> str:
    """``+0.10 to +0.52``; a dash for None."""
    return "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def format_p(value: float | None) -> str:
    """A p value with four decimals, such as ``.0313``; a dash for None."""
    if value is None:
        return "-"
    return "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0") if value < 1 else "1"


def equals_p(value: float) -> str:
    """``= .0313`` or ``< .0001``, after the letter p."""
    text = format_p(value)
    return f"< {text[1:]}" if text.startswith("<") else f"= {text}"


def in_words(verdict: str, variant: str, baseline: str) -> str:
    """A verdict of ``statistics.verdict`` as the beginning of a sentence, in bold."""
    words = {
        "better": f"{variant} is better than {baseline}",
        "worse": f"{variant} is worse than {baseline}",
        "not distinguishable": f"{variant} and {baseline} are not distinguishable",
    }
    return f"**{words.get(verdict, f'{variant} against {baseline}: too few seeds to say')}**"


def to_markdown(sections: Sequence[Section]) -> str:
    """Sections as Markdown; figures are links to ``figures/NAME.svg``."""
    lines = []
    for number, section in enumerate(sections):
        lines += [f"{'#' if not number else '##'} {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        if section.table:
            lines += [render(*section.table).rstrip(), ""]
        for name, alternative, _ in section.figures:
            lines += [f"![{alternative}](figures/{name}.svg)", ""]
    return "\n".join(lines)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #9aa0a688; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { white-space: normal; vertical-align: bottom; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 0.85rem; color: #7a7f87; }
"""


def to_html(sections: Sequence[Section]) -> str:
    """Sections as one HTML page with its figures inside, without scripts or links to other files."""
    parts = []
    for number, section in enumerate(sections):
        level = "h1" if not number else "h2"
        parts.append(f"<{level}>{html.escape(section.title)}</{level}>")
        parts += [f"<p>{_bold(paragraph)}</p>" for paragraph in section.text]
        if section.table:
            header, rows = section.table
            cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
        for _, alternative, svg in section.figures:
            text = html.escape(alternative, quote=True)
            labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
            parts.append(f"<figure>{labelled}<figcaption>{text}</figcaption></figure>")
    title = html.escape(sections[0].title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _bold(paragraph: str) -> str:
    pieces = html.escape(paragraph).split("**")
    return "".join(f"<b>{piece}</b>" if number % 2 else piece for number, piece in enumerate(pieces))
