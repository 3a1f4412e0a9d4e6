"""Class folders: one folder a class, ordered as by torchvision's ImageFolder; hidden files and folders are ignored."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lip_resnet.config import InputError
from lip_resnet.data.decode import readable_suffixes
from lip_resnet.data.sources.base import Files, LeftOut
from lip_resnet.data.sources.classes import explain_difference

KAGGLE_TABLE = "LOC_val_solution.csv"
KAGGLE_IMAGES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")
"""Where ImageNet's train/ and val/ may be below a folder of Kaggle's archive."""
_KAGGLE_COMMAND = "python scripts/prepare_imagenet.py --kaggle {} --output DIR"
_SIMILAR = {"train": ("training",), "val": ("validation", "valid", "dev", "test")}


def hint_for_kaggle(folder: Path) -> str:
    """What to do with a directory that holds Kaggle's ImageNet; "" for another one."""
    if not any((folder / below).is_dir() for below in KAGGLE_IMAGES[:-1]):
        return ""
    return f"; it is Kaggle's ImageNet, which {_KAGGLE_COMMAND.format(folder)} links into class folders: give that DIR"


def hint_for_loose_images(folder: Path) -> str:
    """What to do with a directory that has images and no class folders; "" for one without images."""
    suffixes = readable_suffixes()
    if not any(path.suffix.lower() in suffixes for path in folder.iterdir()):
        return ""
    above = folder.resolve().parents[:4]
    roots = (each for each in above if (each / KAGGLE_TABLE).is_file() or (each / KAGGLE_IMAGES[0]).is_dir())
    command = _KAGGLE_COMMAND.format(next(roots, "KAGGLE"))
    return f"; its images must be in class folders: scripts/prepare_imagenet.py sorts them, Kaggle's by {command}"


def _class_folders(root: Path) -> list[str]:
    try:
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        hint = "" if folders else hint_for_loose_images(root)
    except OSError as error:
        raise InputError(f"data.root: cannot read {root}: {error.strerror}") from error
    if not folders:
        raise InputError(f"data.root: {root} holds no class folders{hint}")
    return folders


def read_selection(path: str) -> str:
    """The content of a data.classes file; bytes that are not UTF-8, as file names may have them, are surrogates.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise InputError(f"data.classes: cannot read {path}: {error.strerror}") from error


def _parse_selection(content: str, path: str, folders: list[str]) -> tuple[list[str], set[str] | None]:
    """A data.classes file -> the classes to keep, and the names of the training images to keep (None: all)."""
    lines = [line.strip("\ufeff \t\r") for line in content.split("\n")]  # joined files have byte order marks inside
    names = {os.path.normpath(line) for line in lines if line and not line.startswith("#")}
    if not names:
        raise InputError(f"data.classes: {path} names no class")
    suffixes, known = readable_suffixes(), set(folders)
    images = {name for name in names - known if "/" in name or os.path.splitext(name)[1].lower() in suffixes}
    classes = names - images
    # An image's class is its folder, or in ImageNet's own naming the part before the underscore.
    images = {name if "/" in name else f"{name.rsplit('_', 1)[0]}/{name}" for name in images}
    classes |= {name.split("/")[0] for name in images}
    unknown = sorted(classes - known)
    if unknown:
        try:
            content.encode("utf-8", "surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise InputError(f"data.classes: cannot read {path}: byte {error.start} is not UTF-8") from error
        raise InputError(f"data.classes: {path}: {len(unknown)} names have no folder, the first is {unknown[0]!r}")
    return sorted(classes), images or None


def _scan(folder: str, around: frozenset[tuple[int, int]]) -> Iterator[tuple[str, list[os.DirEntry]]]:
    """(directory, its files), of a directory and of those below it; symbolic links are followed.

    Args:
        around: device and inode of the directories that hold it.

    Raises:
        InputError: a directory cannot be read, or a symbolic link leads back to a directory that holds it.
    """
    try:
        state = os.stat(folder)
        here = (state.st_dev, state.st_ino)
        if here in around:
            raise InputError(f"data.root: {folder} is a symbolic link to a directory that holds it, a loop; remove it")
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        folders = [entry.path for entry in entries if entry.is_dir()]
        files = [entry for entry in entries if not entry.is_dir()]
    except OSError as error:
        reason = "a symbolic link to itself, a loop; remove it" if error.errno == errno.ELOOP else error.strerror
        raise InputError(f"data.root: cannot read {error.filename or folder}: {reason}") from error
    yield folder, files
    for below in folders:
        yield from _scan(below, around | {here})


def _is_image(entry: os.DirEntry, suffixes: set[str]) -> bool:
    """Whether a file is read as an image; a link to nothing is, and is reported with the images that do not decode."""
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in suffixes and (entry.is_file() or not os.path.exists(entry.path))  # no pipe or device


class Folder(Files):
    """Class folders, in torchvision's ImageFolder order, restricted to some classes.

    Args:
        root: holds one folder a class.
        classes: names of the labels: a folder's label is its index among them. Other folders are not read.
        names: images to keep, each as class/file; None keeps all.
        incomplete: whether classes may have no folder and no image.

    Raises:
        InputError: a folder cannot be read or holds no image, or a symbolic link makes a loop.
    """

    def __init__(
        self, root: Path, classes: Sequence[str], names: set[str] | None = None, incomplete: bool = False
    ) -> None:
        _, files = next(_scan(str(root), frozenset()))
        above, suffixes = root.resolve(), readable_suffixes()
        states = [path.stat() for path in (above, *above.parents)]
        around = frozenset((state.st_dev, state.st_ino) for state in states)
        samples: list[tuple[str, int]] = []
        unread, empty = [entry.path for entry in files], []
        for label, name in sorted(enumerate(classes), key=lambda pair: pair[1]):
            folder, before = os.path.join(root, name), len(samples)
            folders = list(_scan(folder, around)) if os.path.isdir(folder) else []
            for path, entries in sorted(folders, key=lambda pair: pair[0]):
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if _is_image(entry, suffixes):
                        samples.append((f"{path}/{entry.name}", label))
                    else:
                        unread.append(entry.path)
            if len(samples) == before:
                empty.append(name)
        if empty and not (incomplete and samples):
            raise InputError(
                f"data.root: {len(empty):,} of {len(classes):,} class folders of {root} hold no image, the first is "
                f"{empty[0]!r}"
            )
        if names is not None:
            samples = [(path, label) for path, label in samples if os.path.relpath(path, root) in names]
        super().__init__(root, list(classes), samples)
        self.left_out = LeftOut.of(os.path.relpath(path, root) for path in sorted(unread))


def folder_sources(
    data_root: str,
    selection: str | None,
    splits: tuple[str, ...],
    content: str | None = None,
    names: Sequence[str] | None = None,
) -> list[Folder]:
    """The splits below ``data.root``; the classes are the folders of the first.

    Args:
        selection: the file of ``data.classes``; None for all classes.
        content: of that file, where it has been read.
        names: the classes instead, where all folders are among them.

    Raises:
        InputError: folders are missing, unreadable or empty, a later split has other classes, or the selection does not
            fit them.
    """
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root: {root} is not a directory; it must hold train/ and val/")
    for split in splits:
        if not (root / split).is_dir():
            present = {entry.name.lower(): entry.name for entry in root.iterdir() if entry.is_dir()}
            other = next((present[name] for name in (split, *_SIMILAR.get(split, ())) if name in present), None)
            hint = f"; rename or link {other}/" if other else hint_for_kaggle(root)
            raise InputError(
                f"data.root: {root} has no {split}/; it must hold {' and '.join(s + '/' for s in splits)}{hint}"
            )
    folders = {split: _class_folders(root / split) for split in splits}
    images = None
    if selection:
        content = read_selection(selection) if content is None else content
        classes, images = _parse_selection(content, selection, folders[splits[0]])
        folders = {split: sorted(set(classes) & set(present)) for split, present in folders.items()}
    classes = folders[splits[0]]
    if names is not None and set(classes) <= set(names):
        classes = list(names)
    for split, own in folders.items():
        if set(own) - set(classes):
            raise InputError(f"data.root: {explain_difference(f'{splits[0]}/', classes, f'{split}/', own)}")
    sources = [
        Folder(root / split, classes, images if split == "train" else None, incomplete=split != "train")
        for split in splits
    ]
    if images is not None and splits[0] == "train" and len(sources[0]) != len(images):
        prefix = f"{root / 'train'}/"
        missing = sorted(images - {path.removeprefix(prefix) for path, _ in sources[0].samples})
        raise InputError(
            f"data.classes: {selection} lists {len(images)} images, {len(sources[0])} are in {root}/train; the first "
            f"that is not is {missing[0]!r}"
        )
    return sources
