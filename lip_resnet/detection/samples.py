"""What a source of images with boxes is."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image


class Annotations(NamedTuple):
    """The boxes of one image to train on: without crowds, and none of zero size."""

    boxes: np.ndarray
    """(n, 4) float32: x1, y1, x2, y2, pixels of the image."""
    labels: np.ndarray
    """(n,) int64, from 0: label i is ``classes[i]``."""


class DetectionSource(Protocol):
    """Images with boxes of named classes."""

    classes: list[str]
    """The name of every label."""
    category_ids: list[int]
    """The id of every label's category in COCO's form, where ids may have gaps."""
    image_ids: list[int]
    """The id of every image in COCO's form."""
    sizes: np.ndarray
    """(n, 2) int64: height and width of every image as annotated, pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Image.Image:
        """An image, RGB, of its annotated size.

        Raises:
            BadImage: it does not decode, or has another size.
        """
        ...

    def path(self, index: int) -> str:
        """An image's name for messages."""
        ...

    def annotations(self, index: int) -> Annotations:
        """The boxes of an image to train on."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """All annotations in COCO's form, crowds included: what an evaluation compares with."""
        ...

    def describe(self) -> dict[str, Any]:
        """The fingerprint of the set, see ``data.describe_source``; and ``boxes``, how many."""
        ...
