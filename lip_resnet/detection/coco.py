"""Images with boxes in COCO's layout: ROOT/train2017/, ROOT/val2017/ and ROOT/annotations/instances_*.json.

Any set in this form is read. What is refused, and what is left out of training, is said in docs/detection.md, "Data".
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lip_resnet import distributed
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.data.decode import BadImage
from lip_resnet.data.fingerprint import describe_source, digest
from lip_resnet.data.sources.base import Files
from lip_resnet.detection.annotations import clipped, read_annotations, usable_objects
from lip_resnet.detection.samples import Annotations, coco_form
from lip_resnet.errors import InputError


class CocoSource:
    """One split; see ``DetectionSource``. Every process must open it: rank 0 reads the file for all.

    Training leaves out crowd regions, boxes of zero size (also when clipped to the image), and images without a box;
    the evaluation has all of them, as COCO's.

    Args:
        split: "train" or "val".

    Raises:
        InputError: a file is missing, damaged or not of this form.
    """

    def __init__(self, config: EvalDetectionDataConfig, split: str) -> None:
        self.split, root = split, Path(config.root or "").expanduser()
        folder = root / getattr(config, f"{split}_split")
        self.file = root / (getattr(config, f"{split}_annotations") or f"annotations/instances_{folder.name}.json")
        tables = distributed.on_main(lambda: read_annotations(root, folder, self.file))
        usable, notes = usable_objects(tables, self.file)
        kept, lines = np.arange(len(tables.names)), list[str]()
        if split == "train":
            kept = np.flatnonzero(np.diff(np.append(0, np.cumsum(usable))[tables.starts]))
            if not len(kept):
                raise InputError(f"{self.file}: no image has a box to train on")
            notes = {**notes, "images without a box left out of training": len(tables.names) - len(kept)}
            lines = [f"{count:,} {what}" for what, count in notes.items() if count]
        elif tables.crowds.all():
            lines = ["no object to find: AP is undefined"]
        if lines and distributed.is_main():
            print(f"note: {self.file}: {', '.join(lines)}", file=sys.stderr, flush=True)
        self.classes, self.category_ids = tables.classes, tables.category_ids
        self.image_ids = tables.image_ids[kept].tolist()
        self.files = Files(folder, self.classes, [(str(folder / tables.names[index]), 0) for index in kept])
        self.sizes = tables.sizes[kept]
        spans = np.stack([tables.starts[kept], tables.starts[kept + 1]], axis=1)
        arrays = (spans, tables.labels, tables.boxes, tables.areas, tables.crowds, usable)
        # Shared, so that a worker is sent a handle and not a copy.
        self._tensors = [torch.from_numpy(np.ascontiguousarray(array)).share_memory_() for array in arrays]

    def _objects(self, index: int) -> list[np.ndarray]:
        """Of an image: labels (n,), boxes (n, 4) x, y, width, height, areas, crowds and whether to train on each."""
        first, last = self._tensors[0][index].tolist()
        return [tensor[first:last].numpy() for tensor in self._tensors[1:]]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """An image's file."""
        return self.files.path(index)

    def check_size(self, image: Image.Image, index: int) -> None:
        """Check that an image has the size of its annotation.

        Raises:
            BadImage: it has not.
        """
        height, width = self.sizes[index].tolist()
        if image.size != (width, height):
            hint = " (EXIF orientation is not applied)" if image.size == (height, width) else ""
            what = f"{image.width}x{image.height} pixels; {self.file.name} says {width}x{height}{hint}"
            raise BadImage(f"{self.path(index)}: {what}")

    def __getitem__(self, index: int) -> Image.Image:
        image, _ = self.files[index]
        self.check_size(image, index)
        return image

    def annotations(self, index: int) -> Annotations:
        """The boxes of an image to train on, clipped to it."""
        labels, boxes, _, _, usable = self._objects(index)
        height, width = self.sizes[index].tolist()
        return Annotations(clipped(boxes[usable], (width, height)).astype(np.float32), labels[usable])

    def ground_truth(self) -> dict[str, Any]:
        """As ``DetectionSource``'s."""
        return coco_form(self, (self._objects(index)[:-1] for index in range(len(self))))

    def describe(self) -> dict[str, Any]:
        """``data.describe_source``, with the number of ``boxes`` and the digest of the ``annotations``."""
        arrays = (np.array(self.image_ids), self.sizes, *(tensor.numpy() for tensor in self._tensors[:-1]))
        return {
            **describe_source(self.files),
            "boxes": int(self._tensors[0].diff().sum()),
            "annotations": digest(array.tobytes() for array in arrays),
        }
