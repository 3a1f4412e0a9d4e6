"""Where images come from.

A *source* is a torchvision-style dataset: ``source[i]`` is (PIL image, label), ``source.classes`` the class names.
"""

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data.decode import BadImage, check_scan, decode_exact, read_file


class Digits(Dataset):
    """scikit-learn's 1,797 real handwritten digits as RGB images of 8x8; every fifth of a class validates."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits  # a second of imports that only this source needs

        digits = load_digits()
        rank_in_class = np.empty(len(digits.target), dtype=int)
        for label in range(10):
            members = digits.target == label
            rank_in_class[members] = np.arange(members.sum())
        chosen = (rank_in_class % 5 != 4) if train else (rank_in_class % 5 == 4)
        self.pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.targets[index]


class Synthetic(Dataset):
    """Noise that costs nothing to load: (3, size, size) uint8 tensors, so that train.py's own speed can be measured."""

    def __init__(self, images: int, num_classes: int, size: int) -> None:
        self.images = images
        self.classes = tuple(str(label) for label in range(num_classes))
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (min(images, 64), 3, size, size), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index % len(self.pixels)], index % len(self.classes)


def _class_folders(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise InputError(f"data.root: cannot read {root}: {error.strerror}") from None


def _read_selection(path: str, found: list[str]) -> tuple[list[str], set[str] | None]:
    """A data.classes file -> the classes to keep, and the names of the training images to keep (None: all)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"data.classes: cannot read {path}: {reason}") from None
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    images = {line for line in lines if line.lower().endswith(IMG_EXTENSIONS)}
    # An image's class is its folder, or in ImageNet's own naming what stands before the underscore.
    images = {line if "/" in line else f"{line.rsplit('_', 1)[0]}/{line}" for line in images}
    classes = {image.split("/")[0] for image in images}
    classes |= {line for line in lines if not line.lower().endswith(IMG_EXTENSIONS)}
    if not classes:
        raise InputError(f"data.classes: {path} names no class")
    unknown = sorted(classes - set(found))
    if unknown:
        raise InputError(f"data.classes: {path}: {len(unknown)} names have no folder, the first is {unknown[0]!r}")
    return sorted(classes), images or None


class Encoded(Dataset):
    """Image files with labels, wherever their bytes lie.

    Names lie in one shared block of bytes: a million Python strings would be copied, page by page, into every worker.

    Args:
        root: the split's directory.
        classes: the names of the labels.
        samples: every (name, label); a name is what errors and lists call the image.
    """

    def __init__(self, root: Path, classes: list[str], samples: list[tuple[str, int]]) -> None:
        self.root, self.classes = root, classes
        encoded = [os.fsencode(name) for name, _ in samples]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        block = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
        # Shared, so that a worker is sent a handle and not a copy.
        self._names = torch.from_numpy(block.copy()).share_memory_()
        self._ends = torch.from_numpy(ends).share_memory_()
        self._labels = torch.tensor([label for _, label in samples], dtype=torch.int64).share_memory_()
        self._checked = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> bytes:
        """An image's bytes, still encoded.

        Raises:
            BadImage: they cannot be read.
        """
        raise NotImplementedError

    def path(self, index: int) -> str:
        """An image's name: its file, or its place in a shard."""
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._names[start:end].numpy().tobytes())

    def label(self, index: int) -> int:
        """An image's class."""
        return int(self._labels[index])

    @property
    def targets(self) -> list[int]:
        """Every label."""
        return self._labels.tolist()

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Every (name, label), as ImageFolder has them."""
        return [(self.path(index), label) for index, label in enumerate(self.targets)]

    def check(self, index: int, data: bytes) -> None:
        """Look for damage that PIL does not report, once an image: it costs as much as half of decoding."""
        if not self._checked[index]:
            check_scan(data, self.path(index))
            self._checked[index] = 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        data = self.read(index)
        image = decode_exact(data, self.path(index))
        self.check(index, data)
        return image, self.label(index)


class Folder(Encoded):
    """Class folders, in torchvision's ImageFolder order, restricted to some classes.

    Args:
        root: holds one folder a class.
        classes: the folders to read; an image's label is its folder's place among them.
        names: images to keep, each as class/file; None keeps all.
    """

    def __init__(self, root: Path, classes: list[str], names: set[str] | None = None) -> None:
        labels = {name: label for label, name in enumerate(classes)}
        try:
            samples = make_dataset(str(root), labels, IMG_EXTENSIONS)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"data.root: {error}") from None
        if names is not None:
            samples = [(path, label) for path, label in samples if os.path.relpath(path, root) in names]
        super().__init__(root, classes, samples)

    def read(self, index: int) -> bytes:
        """An image file's bytes."""
        return read_file(self.path(index))


class Shards(Encoded):
    """Local tar files in WebDataset layout: KEY.jpg (or another image) and KEY.cls, its label as text, side by side.

    The headers are read once for every image's place; then images are read in any order, as from folders. The set's
    order is that of the shards' names, and within a shard its own.

    Args:
        root: holds the shards, NAME.tar; and perhaps classes.txt, the labels' names, a line each.
    """

    def __init__(self, root: Path) -> None:
        self.shards = sorted(str(path) for path in root.glob("*.tar"))
        if not self.shards:
            raise InputError(f"data.root: {root} holds no .tar shards")
        places, samples = [], []
        for number, shard in enumerate(self.shards):
            for key, label, offset, size in _index_shard(shard):
                places.append((number, offset, size))
                samples.append((f"{shard}:{key}", label))
        self._places = torch.tensor(places, dtype=torch.int64).share_memory_()
        names = root / "classes.txt"
        count = 1 + max(label for _, label in samples)
        classes = names.read_text(encoding="utf-8").split("\n") if names.is_file() else map(str, range(count))
        classes = [name for name in classes if name]
        if len(classes) < count:
            raise InputError(f"{names}: {len(classes)} names, but the shards hold label {count - 1}")
        super().__init__(root, classes, samples)

    def read(self, index: int) -> bytes:
        """An image's bytes, from the middle of its shard."""
        shard, offset, size = self._places[index].tolist()
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise BadImage(f"{self.path(index)}: cannot read this image: {error.strerror}") from None
        if len(data) != size or not size:
            raise BadImage(f"{self.path(index)}: cannot read this image: {len(data)} bytes, the shard says {size}")
        return data


def _index_shard(path: str) -> list[tuple[str, int, int, int]]:
    """(key, label, offset, size) of a shard's images in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, file = os.path.split(member.name)
                key, _, suffix = file.partition(".")
                key = os.path.join(folder, key)
                if f".{suffix.lower()}" in IMG_EXTENSIONS:
                    if key in images:
                        raise InputError(f"{path}: two images have the key {key!r}")
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    labels[key] = archive.extractfile(member).read().strip()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise InputError(f"{path}: not a whole tar archive: {error}") from None
    wrong = next((key for key in images if not labels.get(key, b"").isdigit()), None)
    if wrong is not None or not images:
        raise InputError(
            f"{path}: " + ("it holds no image" if wrong is None else f"{wrong!r} has no label {wrong}.cls")
        )
    return [(key, int(labels[key]), *place) for key, place in images.items()]


def _folder_sources(config: DataConfig, splits: tuple[str, ...]) -> list[Folder]:
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root: {root} is not a directory; it must hold train/ and val/")
    for split in splits:
        if not (root / split).is_dir():
            raise InputError(f"data.root: {root} has no {split}/; it must hold {' and '.join(s + '/' for s in splits)}")
    found = {split: _class_folders(root / split) for split in splits}
    classes = found[splits[0]]
    if not classes:
        raise InputError(f"data.root: {root / splits[0]} holds no class folders")
    images = None
    if config.classes:
        classes, images = _read_selection(config.classes, classes)
    for split in splits[1:]:
        differing = sorted(set(classes) ^ (set(found[split]) & set(classes) if config.classes else set(found[split])))
        if differing:
            raise InputError(
                f"data.root: class folders of {splits[0]}/ and {split}/ differ in {len(differing)}, "
                f"the first is {differing[0]!r}"
            )
    sources = [Folder(root / split, classes, images if split == "train" else None) for split in splits]
    if images is not None and splits[0] == "train" and len(sources[0]) != len(images):
        raise InputError(
            f"data.classes: {config.classes} lists {len(images)} images, {len(sources[0])} are in {root}/train"
        )
    return sources


def build_sources(config: DataConfig, num_classes: int, splits: tuple[str, ...] = ("train", "val")) -> list[Any]:
    """The datasets of the splits asked for, ("train", "val") or ("val",).

    Raises:
        InputError: the folders are not there, differ between the splits, or hold another number of classes.
    """
    if config.name == "digits":
        sources = [Digits(train=split == "train") for split in splits]
    elif config.name == "synthetic":
        shapes = {"train": (config.images, config.sizes[-1]), "val": (max(1, config.images // 10), config.eval_size)}
        sources = [Synthetic(shapes[split][0], num_classes, shapes[split][1]) for split in splits]
    elif config.name == "shards":
        sources = [Shards(Path(config.root).expanduser() / split) for split in splits]
        if any(source.classes != sources[0].classes for source in sources):
            raise InputError(
                f"data.root: the shards of {' and '.join(splits)} in {config.root} differ in their classes"
            )
    else:
        sources = _folder_sources(config, splits)
    found = len(sources[0].classes)
    if found != num_classes:
        raise InputError(f"model.num_classes is {num_classes}, but the data has {found} classes")
    return sources
