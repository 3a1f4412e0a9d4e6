"""Refresh the generated parts of README.md:  python scripts/update_readme.py

A generated part stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import bench_data
import performance

from lip_resnet import LAYERS, checkpoint, distributed
from lip_resnet.config import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
import bad_images

ROOT = Path(__file__).parents[1]


def zoo() -> str:
    """The downsampling layers that a recipe can choose, a line each."""
    lines = [f"| `{name}` | {layer.summary} | {layer.source} |" for name, layer in LAYERS.items()]
    return "\n".join(["| layer | what it does | source |", "|---|---|---|", *lines])


SECTIONS = {
    "zoo": zoo,
    "data": bench_data.section,
    "bad-images": bad_images.table,
    "performance": performance.section,
}


def refresh(text: str, sections: Mapping[str, Callable[[], str]] = SECTIONS) -> str:
    """``text`` with every generated part made anew.

    Raises:
        InputError: a part's markers are missing.
    """
    for name, generate in sections.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"the page lacks the markers <!-- {name}:begin --> and <!-- {name}:end -->")
        body = generate()
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def main() -> None:
    distributed.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    path = ROOT / "README.md"
    text = refresh(path.read_text(encoding="utf-8"))
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    distributed.launch(main)
