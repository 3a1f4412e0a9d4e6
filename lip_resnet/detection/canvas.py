"""Sizes of detection's images: resizing, the padded canvas, groups of similar aspect ratios, batches of one canvas.

A network sees the padding around an image: its convolutions by their biases, instance norms in their statistics. So the
canvas of an image in evaluation is a function of the image alone, and only images of one canvas share a batch.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lip_resnet.data import normalize, to_device

Sizes = list[tuple[int, int]]
"""Height and width of the valid area of every image of a batch, from the upper left corner, pixels."""

STRIDE = 32
"""Sides of a canvas are multiples of this, the largest stride of a backbone."""


def resized(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """(h, w) of an image whose shorter side becomes ``size``, or whose longer one ``max_size`` if it would exceed that.

    All in pixels.
    """
    scale = min(size / min(height, width), max_size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def canvas(height: int, width: int) -> tuple[int, int]:
    """The canvas of a resized image: both sides rounded up to a multiple of ``STRIDE``, pixels."""
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def resize(image: Image.Image, height: int, width: int, flip: bool = False) -> np.ndarray:
    """An RGB image -> (height, width, 3) uint8 by PIL's bilinear filter, flipped horizontally if ``flip``."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels


def eval_batches(sizes: np.ndarray, size: int, max_size: int, batch_size: int) -> list[list[int]]:
    """Image indices in batches of one canvas each, the largest canvas first.

    Args:
        sizes: (n, 2), height and width of every image, pixels.
        size, max_size: as for ``resized``.
        batch_size: the most images in a batch.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(sizes.tolist()):
        members.setdefault(canvas(*resized(height, width, size, max_size)), []).append(index)
    order = sorted(members, key=lambda sides: (-sides[0] * sides[1], sides))
    return [
        members[sides][start : start + batch_size]
        for sides in order
        for start in range(0, len(members[sides]), batch_size)
    ]


def aspect_groups(sizes: np.ndarray, k: int) -> np.ndarray:
    """The group (n,) of every image by its aspect ratio, width / height: 2 k + 2 groups with bounds at 2^(i / k).

    Args:
        sizes: (n, 2), height and width, pixels.
        k: 0 for one group.

    Source: torchvision, references/detection/group_by_aspect_ratio.py.
    """
    if not k:
        return np.zeros(len(sizes), dtype=np.int64)
    return np.digitize(sizes[:, 1] / sizes[:, 0], 2.0 ** np.linspace(-1, 1, 2 * k + 1))


def prepare(
    images: Tensor, sizes: Sizes, device: torch.device, channels_last: bool, mean: Tensor, std: Tensor
) -> Tensor:
    """images (B, 3, H, W) uint8 -> on ``device`` in the network's layout, normalised, zero outside the valid areas."""
    images = normalize(to_device(images, device, channels_last), mean, std)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images
