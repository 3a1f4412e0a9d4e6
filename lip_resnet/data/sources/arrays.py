"""Small pictures that lie in memory as one block."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class Arrays(Dataset):
    """Pictures as pixels.

    Args:
        name: of the set, for an image's name.
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
