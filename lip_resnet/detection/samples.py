"""What a source of images with boxes is, and its objects in COCO's form."""

from collections.abc import Iterable, Sequence
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


def coco_form(source: DetectionSource, objects: Iterable[Sequence[np.ndarray]]) -> dict[str, Any]:
    """The objects of a set in COCO's form, with ids from 1: id 0 would be no object to COCO's evaluation.

    Args:
        objects: of every image: labels (n,), boxes (n, 4) x, y, width, height, areas (n,) and whether each is a crowd.
    """
    images, annotations = [], list[dict[str, Any]]()
    sides = source.sizes.tolist()
    for index, (image, (height, width), arrays) in enumerate(zip(source.image_ids, sides, objects, strict=True)):
        images.append({"id": image, "file_name": source.path(index), "height": height, "width": width})
        for label, box, area, crowd in zip(*(each.tolist() for each in arrays), strict=True):
            common = {"id": len(annotations) + 1, "image_id": image, "category_id": source.category_ids[label]}
            annotations.append({**common, "bbox": box, "area": area, "iscrowd": int(crowd)})
    names = zip(source.category_ids, source.classes, strict=True)
    categories = [{"id": category, "name": name} for category, name in names]
    return {"images": images, "annotations": annotations, "categories": categories}
