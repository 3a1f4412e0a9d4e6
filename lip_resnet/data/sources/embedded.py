"""Sets that need no files: scikit-learn's digits, and synthetic noise."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lip_resnet.data.sources.arrays import Arrays


class Digits(Arrays):
    """scikit-learn's 1,797 real handwritten digits as images of 8x8; every fifth of a class validates."""

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits  # a second of imports that only this source needs

        digits = load_digits()
        rank_in_class = np.empty(len(digits.target), dtype=int)
        for label in range(10):
            members = digits.target == label
            rank_in_class[members] = np.arange(members.sum())
        chosen = (rank_in_class % 5 != 4) if train else (rank_in_class % 5 == 4)
        pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        super().__init__(
            f"digits/{'train' if train else 'val'}", pixels, digits.target[chosen].tolist(), list("0123456789")
        )


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
