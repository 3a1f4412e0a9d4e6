"""Image files with labels, wherever their bytes lie: what folders, shards and tables have in common."""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from lip_resnet.data.decode import check_scan, decode_exact


class Encoded(Dataset, ABC):
    """Image files with labels, wherever their bytes lie.

    Names lie in one shared block of bytes: a million Python strings would be copied, page by page, into every worker.

    Args:
        root: the split's directory, or what stands for it in the name of an image (a URL, a table).
        classes: the names of the labels.
        samples: every (name, label); a name is what errors and lists call the image.
    """

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
        """Announce the images that are read next: a source behind a network can request them all at once."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """An image's bytes, still encoded.

        Raises:
            BadImage: they cannot be read.
        """

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
    def names(self) -> list[bytes]:
        """Every image's name as the file system has it; for a million of them much faster than ``path`` for each."""
        block, ends = self._names.numpy().tobytes(), self._ends.tolist()
        return [block[start:end] for start, end in itertools.pairwise(ends)]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Every (name, label), as ImageFolder has them."""
        return list(zip(map(os.fsdecode, self.names), self.targets, strict=True))

    def check(self, index: int, data: bytes) -> bool:
        """Look for damage that PIL does not report, once an image: it costs as much as half of decoding.

        Returns:
            Whether it is a JPEG that any decoder may have: one without a complaint of libjpeg's.
        """
        if not self._checked[index]:
            self._checked[index] = 1 + check_scan(data, self.path(index))
        return self._checked[index].item() == 2

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        data = self.read(index)
        image = decode_exact(data, self.path(index))
        self.check(index, data)
        return image, self.label(index)
