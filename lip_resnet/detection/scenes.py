"""Digit scenes: scikit-learn's handwritten digits, several and of several sizes on one picture, in COCO's form."""

from typing import Any

import numpy as np
from PIL import Image

from lip_resnet import seeding
from lip_resnet.data.fingerprint import digest
from lip_resnet.data.sources.embedded import Digits
from lip_resnet.detection.samples import Annotations, coco_form

SHAPES = ((192, 256), (256, 192), (256, 256))
"""Height and width of the pictures, pixels."""
SIDES = (20, 120)
"""Shortest and longest side of a digit's square, pixels: areas below 32^2 are COCO's small, above 96^2 its large."""
DIGITS = (3, 8)
"""Fewest and most digits on a picture."""
TRIES = 20
"""Places that are tried for a digit before it is left out: digits overlap little."""
_MAX_OVERLAP = 0.1
"""The largest share of a digit's box that an earlier digit's box may cover."""


class Scenes:
    """Pictures of digits with their boxes; picture i is a function of the split and i.

    Training pictures are made of the training digits, validation pictures of the validation digits.

    Args:
        train: of the training or of the validation digits.
        images: the number of pictures.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, train: bool, images: int) -> None:
        self.name = f"digit_scenes/{'train' if train else 'val'}"
        self.digits, self.train = Digits(train), train
        self.classes = list(self.digits.classes)
        self.category_ids = list(range(1, 11))
        self.image_ids = list(range(1, images + 1))
        scenes = [self._layout(index) for index in range(images)]
        self.sizes = np.array([SHAPES[shape] for shape, *_ in scenes])
        self.layouts = scenes

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> str:
        """A picture's name."""
        return f"{self.name}[{index}]"

    def _random(self, purpose: str, index: int) -> np.random.Generator:
        return np.random.default_rng(seeding.derive(purpose, int(self.train), index))

    def _layout(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Number of the shape, digits (n,) and their boxes (n, 4) int: x1, y1, x2, y2."""
        random = self._random("scene", index)
        shape = int(random.integers(len(SHAPES)))
        height, width = SHAPES[shape]
        chosen: list[int] = []
        boxes: list[np.ndarray] = []
        for _ in range(random.integers(DIGITS[0], DIGITS[1] + 1)):
            side = round(SIDES[0] * (SIDES[1] / SIDES[0]) ** random.random())
            for _ in range(TRIES):
                x, y = random.integers(width - side + 1), random.integers(height - side + 1)
                box = np.array([x, y, x + side, y + side])
                if all(_covered(box, other) <= _MAX_OVERLAP for other in boxes):
                    chosen.append(int(random.integers(len(self.digits))))
                    boxes.append(box)
                    break
        return shape, np.array(chosen), np.stack(boxes)

    def __getitem__(self, index: int) -> Image.Image:
        shape, chosen, boxes = self.layouts[index]
        height, width = SHAPES[shape]
        random = self._random("background", index)
        # A smooth background with grain, and every digit in a colour of its own that stands out from it.
        coarse = Image.fromarray(random.integers(0, 100, (4, 4, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        picture += random.normal(0, 8, picture.shape)
        for digit, (x1, y1, x2, y2) in zip(chosen, boxes, strict=True):
            ink = Image.fromarray(self.digits.pixels[digit]).resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)
            share = np.asarray(ink, dtype=np.float32)[..., None] / 255
            colour = random.integers(130, 256, 3)
            picture[y1:y2, x1:x2] = share * colour + (1 - share) * picture[y1:y2, x1:x2]
        return Image.fromarray(picture.clip(0, 255).astype(np.uint8))

    def annotations(self, index: int) -> Annotations:
        """The boxes of a picture."""
        _, chosen, boxes = self.layouts[index]
        return Annotations(boxes.astype(np.float32), np.array(self.digits.targets)[chosen])

    def ground_truth(self) -> dict[str, Any]:
        """As ``DetectionSource``'s."""

        def objects(index: int) -> tuple[np.ndarray, ...]:
            boxes, labels = self.annotations(index)
            sides = boxes[:, 2:] - boxes[:, :2]
            return labels, np.concatenate([boxes[:, :2], sides], axis=1), sides.prod(axis=1), np.zeros(len(boxes))

        return coco_form(self, map(objects, range(len(self))))

    def describe(self) -> dict[str, Any]:
        """As ``DetectionSource``'s; ``content`` is the digest of the digits and boxes."""
        lines = [np.concatenate([chosen, boxes.reshape(-1)]).tobytes() for _, chosen, boxes in self.layouts]
        boxes = sum(len(chosen) for _, chosen, _ in self.layouts)
        counts = {"images": len(self), "classes": len(self.classes), "boxes": boxes}
        return {**counts, "content": digest([self.digits.pixels.tobytes(), *lines])}


def _covered(box: np.ndarray, other: np.ndarray) -> float:
    """The larger share of the two boxes that their intersection is."""
    x1, y1 = np.maximum(box[:2], other[:2])
    x2, y2 = np.minimum(box[2:], other[2:])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]), (other[2] - other[0]) * (other[3] - other[1]))
    return max(0, x2 - x1) * max(0, y2 - y1) / smaller
