"""Photographs for a network to look at: files that a user names, and a few images of a set."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.decode import BadImage, check_scan, decode_exact, image_errors, read_file, readable_suffixes
from lip_resnet.data.sources.base import Samples, name_sample, prefetch_samples
from lip_resnet.data.transforms import eval_transform

LONGEST_SHOWN = 800
"""Of the sides of ``Photograph.shown``, pixels."""
LARGEST_RATIO = 8
"""Of the longer side to the shorter one."""


@dataclass(frozen=True)
class Photograph:
    """A picture as a person sees it, and as a network reads it."""

    name: str
    size: tuple[int, int]
    """(width, height) of the file."""
    shown: np.ndarray
    """(H, W, 3) uint8, upright, no side above ``LONGEST_SHOWN``."""
    pixels: Tensor
    """(3, h, w) uint8, the whole picture, its shorter side as long as an evaluation resizes it."""


def find_photographs(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, and those of folders and the folders below them that PIL decodes, sorted; hidden ones are not.

    Raises:
        InputError: there is no such file, or a folder holds no image.
    """
    suffixes, files = readable_suffixes(), []
    for path in (Path(each).expanduser() for each in paths):
        inside = [path]
        try:
            if path.is_dir():
                named = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
                # A link to nothing is kept: reading it is an error that names it.
                below = sorted(file for file in named if file.is_file() or not file.exists())
                inside = [file for file in below if not any(p.startswith(".") for p in file.relative_to(path).parts)]
            elif not path.is_file():
                raise InputError(f"{path}: {'not a file or folder' if path.exists() else 'no such file or folder'}")
        except OSError as error:
            raise InputError(f"{path}: cannot read: {error.strerror}") from error
        if not inside:
            raise InputError(f"{path} holds no image that PIL decodes")
        files += inside
    return list(dict.fromkeys(files))


def read_photograph(path: Path, config: EvalDataConfig) -> Photograph:
    """An image of any mode and size, turned upright as its EXIF orientation says, which evaluations ignore.

    Decoded as in evaluations (``decode_exact``) and scaled as they do, but not cropped.

    Raises:
        BadImage: it does not decode, or is more than ``LARGEST_RATIO`` times as long as wide.
    """
    name = str(path)
    data = read_file(name)
    image = decode_exact(data, name)
    check_scan(data, name)
    with image_errors(name, "turn upright"):
        image = ImageOps.exif_transpose(image)
    shorter, longer = sorted(image.size)
    if longer > LARGEST_RATIO * shorter:
        raise BadImage(
            f"{name}: {image.width}x{image.height} pixels; an image can be {LARGEST_RATIO} times as long as wide"
        )
    resampling = Image.Resampling[config.interpolation.upper()]
    width, height = (round(each * config.eval_resize / shorter) for each in image.size)
    pixels = torch.from_numpy(np.array(image.resize((width, height), resampling))).permute(2, 0, 1)
    shown = image.copy()
    shown.thumbnail((LONGEST_SHOWN, LONGEST_SHOWN))
    return Photograph(name, image.size, np.array(shown), pixels)


def evenly_spaced(images: int, count: int) -> list[int]:
    """Up to ``count`` indices of a set of images, evenly spaced and always the same."""
    count = min(count, images)
    return [index * images // count for index in range(count)]


def sample_images(source: Samples, config: EvalDataConfig, count: int) -> list[Photograph]:
    """Up to ``count`` images of a set, evenly spaced in its order and always the same, as an evaluation reads them.

    Raises:
        InputError: one cannot be read.
    """
    chosen = evenly_spaced(len(source), count)
    transform = eval_transform(config)
    prefetch_samples(source, chosen)
    photographs = []
    for index in chosen:
        name = name_sample(source, index)
        with image_errors(name, "load"):
            image, _ = source[index]
            pixels = image if isinstance(image, Tensor) else transform(image)
        size = (image.shape[2], image.shape[1]) if isinstance(image, Tensor) else image.size
        photographs.append(Photograph(name, size, pixels.permute(1, 2, 0).numpy(), pixels))
    return photographs
