"""Class folders: one folder a class, as torchvision's ImageFolder reads them."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from lip_resnet.config import InputError
from lip_resnet.data.sources.base import Files


def _class_folders(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise InputError(f"data.root: cannot read {root}: {error.strerror}") from error


def read_selection(path: str) -> str:
    """The content of a data.classes file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise InputError(f"data.classes: cannot read {path}: {reason}") from error


def _parse_selection(text: str, path: str, folders: list[str]) -> tuple[list[str], set[str] | None]:
    """A data.classes file -> the classes to keep, and the names of the training images to keep (None: all)."""
    lines = text.split("\n")
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    images = {line for line in lines if line.lower().endswith(IMG_EXTENSIONS)}
    # An image's class is its folder, or in ImageNet's own naming the part before the underscore.
    images = {line if "/" in line else f"{line.rsplit('_', 1)[0]}/{line}" for line in images}
    classes = {image.split("/")[0] for image in images}
    classes |= {line for line in lines if not line.lower().endswith(IMG_EXTENSIONS)}
    if not classes:
        raise InputError(f"data.classes: {path} names no class")
    unknown = sorted(classes - set(folders))
    if unknown:
        raise InputError(f"data.classes: {path}: {len(unknown)} names have no folder, the first is {unknown[0]!r}")
    return sorted(classes), images or None


class Folder(Files):
    """Class folders, in torchvision's ImageFolder order, restricted to some classes.

    Args:
        root: holds one folder a class.
        classes: the folders to read; an image's label is its folder's index among them.
        names: images to keep, each as class/file; None keeps all.

    Raises:
        InputError: a folder cannot be read, or holds no image.
    """

    def __init__(self, root: Path, classes: list[str], names: set[str] | None = None) -> None:
        labels = {name: label for label, name in enumerate(classes)}
        try:
            samples = make_dataset(str(root), labels, IMG_EXTENSIONS)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"data.root: {error}") from error
        if names is not None:
            samples = [(path, label) for path, label in samples if os.path.relpath(path, root) in names]
        super().__init__(root, classes, samples)


def folder_sources(
    data_root: str, selection: str | None, splits: tuple[str, ...], content: str | None = None
) -> list[Folder]:
    """The splits below ``data.root``.

    Args:
        selection: the file of ``data.classes``; None for all classes.
        content: of that file, where it has been read.

    Raises:
        InputError: folders are missing, unreadable or empty, the splits differ in their classes, or the selection does
            not fit them.
    """
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root: {root} is not a directory; it must hold train/ and val/")
    for split in splits:
        if not (root / split).is_dir():
            raise InputError(f"data.root: {root} has no {split}/; it must hold {' and '.join(s + '/' for s in splits)}")
    folders = {split: _class_folders(root / split) for split in splits}
    classes = folders[splits[0]]
    if not classes:
        raise InputError(f"data.root: {root / splits[0]} holds no class folders")
    images = None
    if selection:
        content = read_selection(selection) if content is None else content
        classes, images = _parse_selection(content, selection, classes)
    for split in splits[1:]:
        differing = sorted(set(classes) ^ (set(folders[split]) & set(classes) if selection else set(folders[split])))
        if differing:
            raise InputError(
                f"data.root: class folders of {splits[0]}/ and {split}/ differ in {len(differing)}, "
                f"the first is {differing[0]!r}"
            )
    sources = [Folder(root / split, classes, images if split == "train" else None) for split in splits]
    if images is not None and splits[0] == "train" and len(sources[0]) != len(images):
        raise InputError(f"data.classes: {selection} lists {len(images)} images, {len(sources[0])} are in {root}/train")
    return sources
