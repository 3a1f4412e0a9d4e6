"""For prepare_imagenet.py: re-encoding of images as smaller JPEG files, and its effect on sizes, pixels and time."""

import io
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data.decode import decode_exact, read_file
from lip_resnet.data.transforms import TrainTransform, eval_transform

File = tuple[str, bytes, bytes]
"""Path, content before and content after."""


def shrink(data: bytes, name: str, longest: int, quality: int) -> bytes:
    """Re-encode an image file as JPEG; the file itself if that would not be smaller.

    Args:
        name: of the image, for errors.
        longest: the longest side is at most this, pixels (bicubic).
        quality: of the JPEG file, 1 to 95.

    Raises:
        BadImage: it does not decode.
    """
    image = decode_exact(data, name)
    image.thumbnail((longest, longest), Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return min(data, buffer.getvalue(), key=len)


def effect(folder: Path, longest: int, quality: int, rounds: int) -> str:
    """What re-encoding does to the images below a folder, as Markdown: sizes, the evaluation's pixels, and times.

    Times are of one thread, files in memory.

    Args:
        longest, quality: as ``shrink``'s.
        rounds: how many are timed, after one that is not.

    Raises:
        InputError: the folder has no images, or one does not decode.
    """
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise InputError(f"--effect {folder} holds no images")
    files = [(path, data, shrink(data, path, longest, quality)) for path in paths for data in [read_file(path)]]
    config = DataConfig(root=str(folder), batch_size=1)
    evaluation, out = eval_transform(config), torch.empty(config.size, config.size, 3, dtype=torch.uint8)
    fast, exact = (TrainTransform(config.model_copy(update={"decode": decode})) for decode in ("fast", "exact"))
    work: dict[str, Callable[[bytes, str], Any]] = {  # from a file's bytes to pixels of 224x224
        "training, decode: fast": lambda data, path: fast.data(data, path, 0, out),
        "training, decode: exact": lambda data, path: exact.data(data, path, 0, out),
        "validation": lambda data, path: evaluation(decode_exact(data, path)),
    }
    sizes, differences = [], []
    for path, *contents in files:
        images = [decode_exact(data, path) for data in contents]
        sizes.append([(len(data) / 1000, *image.size) for data, image in zip(contents, images, strict=True)])
        first, second = (evaluation(image).int() for image in images)
        differences.append((first - second).abs().double().mean().item())
    (before, width, height), (after, narrower, lower) = np.mean(sizes, axis=0)
    kept = sum(data is new for _, data, new in files)
    lines = [
        f"Longest side at most {longest}, quality {quality}: {len(files)} images, "
        f"{kept} of them kept as they are because the new file would not be smaller.",
        "",
        "| mean | before | after | after / before |",
        "|---|--:|--:|--:|",
        f"| file | {before:.1f} KB | {after:.1f} KB | {after / before:.2f} |",
        f"| width x height | {width:.0f} x {height:.0f} | {narrower:.0f} x {lower:.0f} | |",
    ]
    for name, function in work.items():
        low, middle, high = statistics.quantiles(_ratios(files, function, rounds), n=4, method="inclusive")
        lines.append(f"| time, {name} | | | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    lines += [
        "",
        f"The evaluation's pixels differ by {statistics.fmean(differences):.2f} of 255 on average, "
        f"{max(differences):.2f} in the worst image. Times: one thread, median and quartiles of {rounds} interleaved "
        f"rounds, load {os.getloadavg()[0]:.1f} at the end; Pillow {PIL.__version__}, "
        f"simplejpeg {simplejpeg.__version__}, torch {torch.__version__}.",
    ]
    return "\n".join(lines)


def _ratios(files: list[File], work: Callable[[bytes, str], Any], rounds: int) -> list[float]:
    """Time after / before of each round, which shuffles the files and times the two of each in alternating order."""
    shuffle, ratios = random.Random(0), []
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for path, *contents in shuffle.sample(files, len(files)):
            for which in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                work(contents[which], path)
                seconds[which] += time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    return ratios[1:]  # the first round is a warm-up
