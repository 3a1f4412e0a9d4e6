"""Sets that need no files: scikit-learn's digits, and synthetic noise."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lip_resnet.config import InputError
from lip_resnet.data.sources.base import Arrays


class Digits(Arrays):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels; every fifth image of a class is a validation image.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                f'data.name: digits needs scikit-learn: pip install "lip-resnet[data]" ({error})'
            ) from error

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
    """Noise that costs nothing to load, to measure a run's speed without its data: (3, size, size) uint8 tensors.

    Args:
        images: how many to pretend; 64 different ones are repeated.
        size: their side, pixels.
    """

    def __init__(self, images: int, num_classes: int, size: int) -> None:
        self.images = images
        self.classes = tuple(str(label) for label in range(num_classes))
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (min(images, 64), 3, size, size), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index % len(self.pixels)], index % len(self.classes)
