"""Which data a number was measured on: digests for the records of runs and rows."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lip_resnet.data.sources.arrays import Arrays
from lip_resnet.data.sources.encoded import Encoded

FILE = "fingerprint.json"
"""Written by scripts/check_dataset.py into the directory that holds train/ and val/."""


def digest(lines: Iterable[bytes]) -> str:
    """sha256 of lines."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line + b"\n")
    return f"sha256:{total.hexdigest()}"


def names_of(source: Encoded) -> list[bytes]:
    """Every image as class/file (or shard:key), in the order of the set: its name relative to the set's root."""
    prefix, names = os.fsencode(f"{source.root}/"), source.names
    relative = [name.removeprefix(prefix) for name in names]
    if isinstance(source.root, Path):  # neither a URL nor a table
        segments = b"/%s/" % b"/".join(relative)
        if not all(name.startswith(prefix) for name in names) or any(
            segment in segments for segment in (b"//", b"/./", b"/../")
        ):  # e.g. a key of a shard
            return [os.fsencode(os.path.relpath(os.fsdecode(name), source.root)) for name in names]
    return relative


def describe_source(source: Any) -> dict[str, Any]:
    """Images, classes, and a digest of what a set holds.

    ``names`` covers a folder's class and file names in order; ``content`` the files' bytes too, where check_dataset.py
    has read them all and no name has changed since (else None). Pictures in memory are digested themselves; synthetic
    noise has nothing to digest.

    It takes a second for a million images: with several processes, call it on one of them.
    """
    description: dict[str, Any] = {"images": len(source), "classes": len(source.classes)}
    if isinstance(source, Arrays):
        description["content"] = digest([source.pixels.tobytes(), bytes(source.targets)])  # labels below 256
    elif isinstance(source, Encoded):
        names = digest(names_of(source))
        recorded = _recorded(source.root) if isinstance(source.root, Path) else {}
        description |= {"names": names, "content": recorded.get(names)}
    return description


def _recorded(split: Path) -> dict[str, str]:
    """The digests that check_dataset.py has left beside a split: names -> content."""
    try:
        splits = json.loads((split.parent / FILE).read_text(encoding="utf-8"))
        return {entry["names"]: entry["content"] for entry in splits.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: the names must do
        return {}
