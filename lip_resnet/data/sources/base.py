"""What a source of images is, and the two ways to hold one: as encoded files, or as pixels in memory."""

import itertools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lip_resnet import distributed
from lip_resnet.data.decode import check_scan, decode_exact, one_line, read_file

Label = int | list[int]
"""A class; or, for a test set with several right classes an image, all of them, padded with -1."""


class Samples(Protocol):
    """What a loader reads: a map-style dataset, such as torchvision's.

    It may also have ``path(index) -> str``, an image's name for messages, and ``prefetch(indices)``, which is called
    with the samples of a batch before they are read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image | Tensor, Label]:
        """An image, of PIL or a (3, H, W) uint8 tensor that is used without resizing; and its label."""
        ...


class Source(Samples, Protocol):
    """Samples of named classes: label i is ``classes[i]``."""

    @property
    def classes(self) -> Sequence[str]: ...


def name_sample(samples: Samples, index: int) -> str:
    """A sample's name for messages."""
    path = getattr(samples, "path", None)
    return f"sample {index}" if path is None else path(index)


def prefetch_samples(samples: Samples, indices: Sequence[int]) -> None:
    """Let samples that can be requested all at once be requested: those of the next batch."""
    prefetch = getattr(samples, "prefetch", None)
    if prefetch is not None:
        prefetch(indices)


def readable(name: str) -> str:
    """A file name in one line that any encoding of Unicode can hold."""
    return one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class LeftOut:
    """Files of a split that no image is read from: of formats that PIL does not decode, labels without an image, ..."""

    files: int = 0
    first: tuple[str, ...] = ()
    """Names of the first few, relative to the split, readable in any encoding."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "LeftOut":
        """From the names of all."""
        names = list(names)
        return cls(len(names), tuple(map(readable, names[:3])))

    @classmethod
    def sum(cls, parts: Iterable["LeftOut"]) -> "LeftOut":
        """Of several folders or shards."""
        parts = list(parts)
        return cls(sum(part.files for part in parts), tuple(name for part in parts for name in part.first)[:3])

    def __str__(self) -> str:
        names = ", ".join(self.first) + (", ..." if self.files > len(self.first) else "")
        return (
            f"{self.files:,} {'file' if self.files == 1 else 'files'} left out (not an image that PIL decodes): {names}"
        )


def say_left_out(source: Any) -> None:
    """Print what a source leaves out, if anything, on rank 0."""
    left_out = getattr(source, "left_out", LeftOut())
    if left_out.files and distributed.is_main():
        print(f"note: {source.root}: {left_out}", file=sys.stderr, flush=True)


class Encoded(Dataset, ABC):
    """Encoded images with labels, in files, shards or a table.

    Names are kept in one shared block of bytes: a million Python strings would be copied, page by page, into every
    worker.

    Args:
        root: the split's directory, or what stands for it in the name of an image (a URL, a table).
        classes: the names of the labels; empty where the data has none, until ``settle_classes`` numbers them.
        samples: every (name, label); the name is used in errors and lists.
    """

    left_out = LeftOut()

    def __init__(self, root: Path | str, classes: list[str], samples: list[tuple[str, int]]) -> None:
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

    def prefetch(self, indices: Sequence[int]) -> None:
        """Request the images that are read next, if the source is behind a network."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """An image's bytes, still encoded.

        Raises:
            BadImage: they cannot be read.
        """

    def path(self, index: int) -> str:
        """An image's name: its file, or its shard and key."""
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._names[start:end].numpy().tobytes())

    def label(self, index: int) -> Label:
        """An image's class."""
        return int(self._labels[index])

    @property
    def targets(self) -> list[int]:
        """Every label."""
        return self._labels.tolist()

    @property
    def names(self) -> list[bytes]:
        """Every image's name in the file system's encoding; for a million much faster than ``path`` for each."""
        block, ends = self._names.numpy().tobytes(), self._ends.tolist()
        return [block[start:end] for start, end in itertools.pairwise(ends)]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Every (name, label), as ImageFolder has them."""
        return list(zip(map(os.fsdecode, self.names), self.targets, strict=True))

    def check(self, index: int, data: bytes) -> bool:
        """Look for damage that PIL does not report, once for each image: it takes half as long as decoding.

        Returns:
            Whether it is a JPEG that libjpeg decodes without a warning, so that any decoder may be used.

        Raises:
            BadImage: the compressed data is damaged.
        """
        if not self._checked[index]:
            self._checked[index] = 1 + check_scan(data, self.path(index))
        return self._checked[index].item() == 2

    def __getitem__(self, index: int) -> tuple[Image.Image, Label]:
        data = self.read(index)
        image = decode_exact(data, self.path(index))
        self.check(index, data)
        return image, self.label(index)


class Files(Encoded):
    """Image files anywhere on a disk; an image's name is its path."""

    def read(self, index: int) -> bytes:
        """An image file's bytes.

        Raises:
            BadImage: the file cannot be read, or is empty.
        """
        return read_file(self.path(index))


class Arrays(Dataset):
    """Small images in memory, as one array.

    Args:
        name: of the set, for the images' names.
        pixels: (n, H, W) or (n, H, W, 3) uint8.
        targets: n labels.
        classes: the names of the labels.
    """

    def __init__(self, name: str, pixels: np.ndarray, targets: list[int], classes: list[str]) -> None:
        self.name, self.pixels, self.targets, self.classes = name, pixels, targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        """An image's name."""
        return f"{self.name}[{index}]"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.targets[index]
