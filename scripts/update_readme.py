"""Refresh the generated parts of README.md:  python scripts/update_readme.py

A generated part stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

import re
from pathlib import Path

import bad_images
import bench_data
import performance

from lip_resnet import LAYERS, checkpoint, distributed
from lip_resnet.config import InputError

README = Path(__file__).parents[1] / "README.md"


def zoo() -> str:
    """The downsampling layers that a recipe can choose, a line each."""
    lines = [f"| `{name}` | {layer.line} | {layer.source} |" for name, layer in LAYERS.items()]
    return "\n".join(["| layer | what it does | source |", "|---|---|---|", *lines])


SECTIONS = {
    "zoo": zoo,
    "data": bench_data.section,
    "bad-images": bad_images.table,
    "performance": performance.section,
}


def refresh(text: str) -> str:
    """``text`` with every generated part made anew.

    Raises:
        InputError: a part's markers are missing.
    """
    for name, generate in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"README.md lacks the markers <!-- {name}:begin --> and <!-- {name}:end -->")
        body = generate()
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def main() -> None:
    distributed.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = refresh(README.read_text(encoding="utf-8"))
    checkpoint.write_atomically(README, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    distributed.launch(main)
