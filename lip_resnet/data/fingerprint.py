"""Which data a number was measured on: digests for the records of runs and rows."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lip_resnet.data.arrays import Arrays
from lip_resnet.data.encoded import Encoded

FILE = "fingerprint.json"
"""Written by scripts/check_dataset.py into the directory that holds train/ and val/."""


def digest(lines: Iterable[bytes]) -> str:
    """sha256 of lines."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line + b"\n")
    return f"sha256:{total.hexdigest()}"


def names_of(source: Encoded) -> list[bytes]:
    """Every image as class/file (or shard:key), in the order of the set."""
    if not isinstance(source.root, Path):  # a URL, a table
        return [os.fsencode(path.removeprefix(f"{source.root}/")) for path, _ in source.samples]
    return [os.fsencode(os.path.relpath(path, source.root)) for path, _ in source.samples]


def describe_source(source: Any) -> dict[str, Any]:
    """Images, classes, and a digest of what a set holds.

    ``names`` covers a folder's class and file names in order; ``content`` the files' bytes too, where check_dataset.py
    has read them all and no name has changed since (else None). Pictures in memory are digested themselves; synthetic
    noise has nothing to digest.
    """
    found: dict[str, Any] = {"images": len(source), "classes": len(source.classes)}
    if isinstance(source, Arrays):
        found["content"] = digest([source.pixels.tobytes(), bytes(source.targets)])  # labels below 256
    elif isinstance(source, Encoded):
        found["names"] = digest(names_of(source))
        found["content"] = _recorded(source.root).get(found["names"]) if isinstance(source.root, Path) else None
    return found


def _recorded(split: Path) -> dict[str, str]:
    """The digests that check_dataset.py has left beside a split: names -> content."""
    try:
        splits = json.loads((split.parent / FILE).read_text(encoding="utf-8"))
        return {entry["names"]: entry["content"] for entry in splits.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: the names must do
        return {}
