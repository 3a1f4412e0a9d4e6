"""ImageNet as Kaggle has it: ILSVRC/Data/CLS-LOC/{train/<wnid>,val}/*.JPEG, and LOC_val_solution.csv beside ILSVRC."""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lip_resnet.config import InputError
from lip_resnet.data.fingerprint import digest
from lip_resnet.data.sources.folder import KAGGLE_IMAGES, KAGGLE_TABLE
from lip_resnet.files import make_folder
from prepare.writing import Member

LABELS = "sha256:93a17e6849c3d1b40cede5541f80a844afbbec44b3f7e1e70afd41fea2a47574"
"""Digest of the official validation labels: a line "ILSVRC2012_val_00000001 n01751748" an image, in order."""
_IMAGES = {"train": 1_281_167, "val": 50_000}
_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Kaggle:
    """The images of both splits."""

    images: Path
    """The folder CLS-LOC, without links in its path."""
    classes: list[str]
    """The class folders of train/, sorted."""
    labels: dict[str, str]
    """Name of a validation image without .JPEG -> its class, sorted by name."""
    files: dict[str, list[str]]
    """Class -> the names of its training images, sorted."""

    def train_images(self) -> Iterator[Member]:
        """Every training image, by class and name."""
        for name in self.classes:
            for file in self.files[name]:
                yield from _read(self.images / "train" / name / file, name)

    def val_images(self) -> Iterator[Member]:
        """Every validation image, by name."""
        for image, name in self.labels.items():
            yield from _read(self.images / "val" / f"{image}.JPEG", name)

    def link_train(self, to: Path) -> dict[str, int]:
        """Make ``to`` a link to the class folders: the number of ``images`` and ``classes``."""
        _link(to, self.images / "train")
        return {"images": sum(map(len, self.files.values())), "classes": len(self.classes)}

    def link_val(self, to: Path) -> dict[str, int]:
        """Make a link to/class/image for every image: the number of ``images`` and ``classes``."""
        classes = set(self.labels.values())
        for name in classes:
            make_folder(to / name)
        for image, name in self.labels.items():
            _link(to / name / f"{image}.JPEG", self.images / "val" / f"{image}.JPEG")
        return {"images": len(self.labels), "classes": len(classes)}


def _read(path: Path, name: str) -> Iterator[Member]:
    """One image; its file is open until the next is asked for."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"--kaggle: cannot read {path}: {error.strerror}") from error
    with file:
        yield name, path.name, file, os.fstat(file.fileno()).st_size


def _link(link: Path, target: Path) -> None:
    """Make a symbolic link; one that is there already is kept.

    Raises:
        InputError: something else is there, or it cannot be made.
    """
    try:
        link.symlink_to(target)
    except FileExistsError as error:
        if not link.is_symlink() or os.readlink(link) != str(target):
            raise InputError(f"--output: {link} exists, and is not a link to {target}; choose another") from error
    except OSError as error:
        raise InputError(f"--output: cannot make {link}: {error.strerror}") from error


def open_kaggle(root: Path, any_archive: bool) -> Kaggle:
    """Read names and labels; ``root`` is any of the folders that Kaggle's archive unpacks to, down to CLS-LOC.

    Args:
        any_archive: accept other images and labels than ImageNet's.

    Raises:
        InputError: it is not Kaggle's folder, or incomplete, or its labels are others.
    """
    images = next((root / below for below in KAGGLE_IMAGES if (root / below / "val").is_dir()), None)
    if images is None:
        what = "is not a folder" if not root.is_dir() else f"has no {KAGGLE_IMAGES[0]}/val"
        hint = "; unpack Kaggle's archive first" if root.suffix == ".zip" else ""
        raise InputError(f"--kaggle {root} {what}: give the folder that holds ILSVRC/ and {KAGGLE_TABLE}{hint}")
    above = (root, *images.resolve().parents[:3])
    table = next((path for folder in above if (path := folder / KAGGLE_TABLE).is_file()), None)
    if table is None:
        raise InputError(
            f"--kaggle {root}: there is no {KAGGLE_TABLE}, which names the class of every validation image; Kaggle has "
            f"it beside ILSVRC/: put it into {root}"
        )
    labels = read_labels(table)
    try:
        classes = sorted(entry.name for entry in os.scandir(images / "train") if _WNID.fullmatch(entry.name))
        files = {name: _images_of(images / "train" / name) for name in classes}
        present = {name.removesuffix(".JPEG") for name in _images_of(images / "val")}
    except OSError as error:
        raise InputError(f"--kaggle: cannot read {error.filename}: {error.strerror}") from error
    if missing := sorted(set(labels) - present) or sorted(present - set(labels)):
        has, lacks = (table, images / "val") if set(labels) - present else (images / "val", table)
        raise InputError(f"--kaggle: {len(missing):,} images of {has} are not in {lacks}, the first is {missing[0]}")
    if unknown := sorted(set(labels.values()) - set(classes)):
        raise InputError(f"--kaggle: {table} names classes without a folder in {images}/train, such as {unknown[0]}")
    counts = {"train": sum(map(len, files.values())), "val": len(labels)}
    problems = [
        f"{split}/ has {counts[split]:,} images, ImageNet {number:,}"
        for split, number in _IMAGES.items()
        if counts[split] != number
    ]
    if len(classes) != _CLASSES:
        problems.append(f"train/ has {len(classes):,} class folders, ImageNet {_CLASSES:,}")
    if not problems and digest(f"{image} {name}".encode() for image, name in labels.items()) != LABELS:
        problems.append(f"the labels of {table} are not the official ones")
    if problems and not any_archive:
        raise InputError(f"--kaggle {root}: {'; '.join(problems)}: is it complete? (--any-archive accepts it)")
    return Kaggle(images.resolve(), classes, labels, files)


def read_labels(table: Path) -> dict[str, str]:
    """LOC_val_solution.csv: name of an image -> its class, sorted by name.

    Raises:
        InputError: it cannot be read, or a line is none of its kind.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: cannot read: {getattr(error, 'strerror', None) or error}") from error
    if header != ["ImageId", "PredictionString"]:
        raise InputError(f"{table}: its columns are {','.join(header)[:80]}; they must be ImageId,PredictionString")
    labels: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        classes = {word for word in (row[1].split() if len(row) == 2 else ()) if _WNID.fullmatch(word)}
        if len(classes) != 1 or row[0] in labels or not re.fullmatch(r"\w+", row[0]):
            raise InputError(f"{table}: line {number}: not an image and its one class: {','.join(row)[:80]!r}")
        labels[row[0]] = classes.pop()
    return dict(sorted(labels.items()))


def _images_of(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".JPEG"))
