"""What --data names: the ``data.name`` and ``data.root`` of its images, and their folder below that root."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lip_resnet import distributed
from lip_resnet.config import InputError, TorchvisionSet
from lip_resnet.data.sources.folder import hint_for_kaggle, hint_for_loose_images
from lip_resnet.data.sources.index import FILE, cached_index
from lip_resnet.data.sources.patterns import split_pattern
from lip_resnet.data.sources.remote import MissingFile, Remote, is_url

KINDS = ("folder", "shards", "huggingface", *get_args(TorchvisionSet))
"""Every ``data.name`` that has a ``data.root``."""

_FOLDERS = {
    "imagenet": ("imagenet", "val"),
    "imagenet-v2": ("imagenet-v2", "imagenetv2-matched-frequency-format-val"),
    "imagenet-real": ("imagenet-real", "imagenet", "val"),
}
"""Test set -> names that its folder may have, where there are others than its own."""


_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names of folders that are splits of a set, not its classes."""


def locate(
    data: str,
    test_set: str | None = None,
    several: bool = False,
    kind: str | None = None,
    named: Sequence[str] = (),
) -> tuple[dict, str]:
    """The keys ``name``, ``root`` and ``val`` of a set, and its split (folder below the root).

    Args:
        data: --data. For a validation set the directory that holds val/, or that folder, with class folders or tar
            shards; the URL of such shards; a folder of Parquet files; or for another ``kind`` its ``data.root``. For a
            test set its folder, or a directory that holds it under its name.
        test_set: one of ``testsets.IMAGES``; None for a validation set.
        several: whether ``data`` must be the directory of several test sets, not one of them.
        kind: the ``data.name`` of a validation set, from the recipe or --data-name. For None, "folder" and "shards" the
            content of ``data`` decides.
        named: the recipe's ``data.val``, which is kept where ``data`` is a directory or URL of shards without val/.

    Raises:
        InputError: ``data`` does not exist, or has none of these layouts.
    """
    keys, split = _locate(data, test_set, several, kind, named)
    return {"val": (), **keys}, split


def _locate(data: str, test_set: str | None, several: bool, kind: str | None, named: Sequence[str]) -> tuple[dict, str]:
    validation = test_set in (None, "imagenet", "imagenet-real")
    if test_set is None and kind is not None and kind not in ("folder", "shards"):
        if kind not in KINDS:
            raise InputError(
                f"--data {data}: the recipe's data.name is {kind}, which is not read from a directory; give no --data, "
                "or the kind of its images with --data-name"
            )
        return {"name": kind, "root": os.path.expanduser(data)}, "val"
    if validation and (pattern := split_pattern(data)) is not None:
        root_of_shards, names = pattern
        return {"name": "shards", "root": os.path.expanduser(root_of_shards), "val": (names,)}, "val"
    if is_url(data):
        if not validation:
            raise InputError(f"--data {data}: {test_set} must be a local folder; only shards are read from a URL")
        url = data.rstrip("/")
        has_val = distributed.on_main(lambda: _has_index(f"{url}/val"))
        if named and not has_val:
            return {"name": "shards", "root": url, "val": tuple(named)}, "val"
        parent, split = (url, "val") if has_val else url.rsplit("/", 1)
        return {"name": "shards", "root": parent}, split
    root = Path(data).expanduser()
    if not root.is_dir():
        expected = "it must hold val/, or be that folder" if test_set is None else f"it must be {test_set}, or hold it"
        raise InputError(f"--data {root} is not a directory; {expected}")
    if test_set is not None:
        folders = [root / folder for folder in _FOLDERS.get(test_set, (test_set,))]
        folder = next((folder for folder in folders if folder.is_dir()), None if several else root)
        if folder is None:
            raise InputError(f"--data {root} has no {folders[0].name}/; for several sets it must hold each by its name")
        root = folder
    if not validation:
        return {"name": "folder", "root": str(root)}, ""
    if test_set is None and any(next(root.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet")):
        return {"name": "huggingface", "root": str(root)}, "val"
    split = "val"
    if not (root / "val").is_dir():
        if hint := hint_for_kaggle(root):
            raise InputError(f"--data {root} has no val/{hint}")
        if named and next(root.glob("*.tar"), None) is not None:
            return {"name": "shards", "root": str(root), "val": tuple(named)}, "val"
        present = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if present and {name.lower() for name in present} <= _SPLITS:
            choice = next((name for name in present if not name.lower().startswith("train")), present[0])
            held = ", ".join(f"{name}/" for name in present)
            raise InputError(f"--data {root} has no val/ but {held}: give one of these, such as --data {root / choice}")
        root, split = root.resolve().parent, root.resolve().name
    return {"name": layout(root / split), "root": str(root)}, split


def _has_index(url: str) -> bool:
    if cached_index(url).is_file():
        return True
    try:
        Remote(url).read(FILE, 0, 1)
    except MissingFile:
        return False
    return True


def layout(folder: Path) -> str:
    """The ``data.name`` of a directory: "folder" if it has class folders, "shards" if it has tar files.

    Raises:
        InputError: it has neither, or cannot be read.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error
    if any(entry.is_dir() for entry in entries):
        return "folder"
    suffixes = {entry.suffix.lower() for entry in entries}
    if ".tar" in suffixes:
        return "shards"
    raise InputError(f"{folder} holds neither class folders nor .tar shards{hint_for_loose_images(folder)}")
