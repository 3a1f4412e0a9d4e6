"""Pictures of many photographs on one HTML page, which holds them itself."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lip_resnet.files import make_folder, write_atomically


@dataclass(frozen=True)
class Picture:
    """A figure as a file."""

    file: str
    """Its name, with .png or .svg."""
    alternative: str
    """Text for readers who do not see it; the page shows it below."""
    content: bytes


def write_picture(folder: Path, file: str, alternative: str, content: bytes) -> Picture:
    """Write a picture into the folder, which is made with the first one.

    Raises:
        InputError: it cannot be written.
    """
    make_folder(folder)
    write_atomically(folder / file, lambda opened: opened.write(content))
    return Picture(file, alternative, content)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #9aa0a688; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: 0.85rem; color: #7a7f87; }
"""


def to_page(title: str, paragraphs: Sequence[str], table: Sequence[Sequence[str]], pictures: Sequence[Picture]) -> str:
    """One HTML page without scripts or links to other files; the table's first row is its header."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(each)}</p>" for each in paragraphs)]
    rows = [
        "<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row) + "</tr>"
        for cell, row in zip(("th", *("td" for _ in table)), table, strict=False)
    ]
    parts.append(f"<table>{''.join(rows)}</table>")
    for picture in pictures:
        kind = "svg+xml" if picture.file.endswith(".svg") else "png"
        source = f"data:image/{kind};base64,{base64.b64encode(picture.content).decode()}"
        text = html.escape(picture.alternative, quote=True)
        parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
