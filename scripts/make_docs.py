"""Write the generated parts of the documentation:  python scripts/make_docs.py

A generated part stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. Measurements come from ``results/``;
nothing is measured here.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import performance

from lip_resnet import LAYERS, checkpoint, distributed
from lip_resnet.config import InputError
from lip_resnet.paper import check_sizes, load_paper, render_table
from lip_resnet.results import render

ROOT = Path(__file__).parents[1]


def layers() -> str:
    """The downsampling layers that a recipe can choose, a line each."""
    rows = [[f"`{name}`", layer.line, layer.source] for name, layer in LAYERS.items()]
    return render(["layer", "what it does", "source"], rows, [], "md")


def paper() -> str:
    """The paper's networks, counted by this code, and the published figures."""
    figures = load_paper(ROOT / "scripts" / "paper.yaml")
    return render_table(figures, {row.name: check_sizes(row) for row in figures.rows}, [])


def bad_images() -> str:
    """The outcome for each kind of broken or unusual image."""
    text = (ROOT / "results" / "bad_images.jsonl").read_text(encoding="utf-8")
    rows = [list(json.loads(line).values()) for line in text.splitlines()]
    return render(["a file named .JPEG that is", "training, `exact`", "training, `fast`", "validation"], rows, [], "md")


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/performance.md": {"performance": performance.section},
    "docs/paper.md": {"paper-report": paper},
    "docs/layers.md": {"zoo": layers},
    "docs/data.md": {"data": performance.loaders, "bad-images": bad_images},
}


def refresh(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """``text`` with the parts named by ``sections`` generated again.

    Raises:
        InputError: a part's markers are missing.
    """
    for name, generate in sections.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"the page lacks the markers <!-- {name}:begin --> and <!-- {name}:end -->")
        body = generate().rstrip()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> None:
    distributed.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, sections in PAGES.items():
        path = ROOT / name
        text = refresh(path.read_text(encoding="utf-8"), sections)
        checkpoint.write_atomically(path, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    distributed.launch(main)
