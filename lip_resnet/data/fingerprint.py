"""Digests of a set, which runs and rows record: on which data a number was measured."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lip_resnet.data.sources.base import Arrays, Encoded, Source

FILE = "fingerprint.json"
"""Written by scripts/check_dataset.py into the directory that holds train/ and val/."""


def digest(lines: Iterable[bytes]) -> str:
    """sha256 of lines, each with a line feed after it, as "sha256:" and hexadecimal digits."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line + b"\n")
    return f"sha256:{total.hexdigest()}"


def names_of(source: Encoded) -> list[bytes]:
    """Every image's name relative to the root, class/file or shard:key, in the order of the set."""
    prefix, names = os.fsencode(f"{source.root}/"), source.names
    relative = [name.removeprefix(prefix) for name in names]
    if isinstance(source.root, Path):  # neither a URL nor a table
        segments = b"/%s/" % b"/".join(relative)
        if not all(name.startswith(prefix) for name in names) or any(
            segment in segments for segment in (b"//", b"/./", b"/../")
        ):  # such as in the key of a shard
            return [os.fsencode(os.path.relpath(os.fsdecode(name), source.root)) for name in names]
    return relative


def class_names(source: Source, kind: str) -> list[str] | None:
    """The names of a source's classes; None where there are only numbers, as in shards and tables without names.

    Args:
        kind: the ``data.name`` of the source.
    """
    names = list(source.classes)
    unnamed = kind in ("shards", "huggingface", "synthetic") and names == [str(label) for label in range(len(names))]
    return None if unnamed else names


def describe_source(source: Source) -> dict[str, Any]:
    """The fingerprint of a set. It takes a second for a million images: with several processes, call it on one of them.

    Returns:
        ``images`` and ``classes``: how many; ``names``: digest of the images' names in order; ``content``: digest of
        the files' bytes too, if check_dataset.py has recorded it and no name has changed since, else None;
        ``left_out``, where there are any: how many files no image is read from, and the first few. Images in memory
        have the digest of their pixels and labels as ``content`` and no ``names``; synthetic noise has neither.
    """
    description: dict[str, Any] = {"images": len(source), "classes": len(source.classes)}
    if isinstance(source, Arrays):
        description["content"] = digest([source.pixels.tobytes(), bytes(source.targets)])  # labels below 256
    elif isinstance(source, Encoded):
        names = digest(names_of(source))
        recorded = _recorded(source.root) if isinstance(source.root, Path) else {}
        description |= {"names": names, "content": recorded.get(names)}
        if source.left_out.files:
            description["left_out"] = {"files": source.left_out.files, "first": list(source.left_out.first)}
    return description


def _recorded(split: Path) -> dict[str, str]:
    """The digests that check_dataset.py has recorded beside a split: of the names -> of the content."""
    try:
        splits = json.loads((split.parent / FILE).read_text(encoding="utf-8"))
        return {entry["names"]: entry["content"] for entry in splits.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, or not of this format
        return {}
