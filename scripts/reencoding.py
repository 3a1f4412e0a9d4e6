"""Smaller JPEG files: how prepare_imagenet.py makes them, and what that does to sizes, pixels and speed."""

import io
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data.decode import decode_exact, read_file
from lip_resnet.data.transforms import TrainTransform, eval_transform


def shrink(data: bytes, name: str, longest: int, quality: int) -> bytes:
    """An image with its longest side at most ``longest`` as JPEG; the file itself where that would not be smaller."""
    image = decode_exact(data, name)
    image.thumbnail((longest, longest), Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return min(data, buffer.getvalue(), key=len)


class _File(NamedTuple):
    path: str
    before: bytes
    after: bytes


def measure(folder: Path, longest: int, quality: int, rounds: int) -> dict[str, Any]:
    """What re-encoding does to the images below a folder.

    Times are of one thread, files in memory; every round takes the files in an order of its own, each before and after
    right behind each other, first the one, then in the next round the other.

    Returns:
        ``images``; ``kept``: files left as they were; ``bytes``, ``width`` and ``height``: means, [before, after];
        ``difference``: mean absolute difference of the evaluation's pixels, of 255, ``mean`` over the images and
        ``worst`` image; ``time``: what is done to an image -> the rounds' ratios of the time after to that before.

    Raises:
        InputError: no images there, or one that does not decode.
    """
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise InputError(f"--effect {folder} holds no images")
    files = []
    for path in paths:
        data = read_file(path)
        files.append(_File(path, data, shrink(data, path, longest, quality)))
    sizes = [[decode_exact(data, file.path).size for data in file[1:]] for file in files]
    config = DataConfig(root=str(folder), batch_size=1)
    evaluation = eval_transform(config)
    pixels = [[evaluation(decode_exact(data, file.path)).numpy() for data in file[1:]] for file in files]
    apart = [np.abs(before.astype(int) - after).mean() for before, after in pixels]
    return {
        "images": len(files),
        "kept": sum(file.after is file.before for file in files),
        "bytes": [statistics.fmean(len(file[which]) for file in files) for which in (1, 2)],
        "width": [statistics.fmean(both[which][0] for both in sizes) for which in (0, 1)],
        "height": [statistics.fmean(both[which][1] for both in sizes) for which in (0, 1)],
        "difference": {"mean": float(np.mean(apart)), "worst": float(np.max(apart))},
        "time": {name: _ratios(files, work, rounds) for name, work in _work(config, evaluation).items()},
    }


def _work(config: DataConfig, evaluation: v2.Transform) -> dict[str, Callable[[_File, bytes], Any]]:
    """What is timed: the whole way from a file's bytes to pixels of 224x224."""
    out = torch.empty(config.size, config.size, 3, dtype=torch.uint8)
    fast, exact = (TrainTransform(config.model_copy(update={"decode": decode})) for decode in ("fast", "exact"))
    return {
        "training, decode: fast": lambda file, data: fast.data(data, file.path, 0, out),
        "training, decode: exact": lambda file, data: exact.data(data, file.path, 0, out),
        "validation": lambda file, data: evaluation(decode_exact(data, file.path)),
    }


def _ratios(files: list[_File], work: Callable[[_File, bytes], Any], rounds: int) -> list[float]:
    shuffle, ratios = random.Random(0), []
    for number in range(rounds + 1):
        spent = {1: 0.0, 2: 0.0}
        for file in shuffle.sample(files, len(files)):
            for which in (1, 2) if number % 2 else (2, 1):
                began = time.perf_counter()
                work(file, file[which])
                spent[which] += time.perf_counter() - began
        if number:  # the first round warms up
            ratios.append(spent[2] / spent[1])
    return ratios


def render(found: dict[str, Any], longest: int, quality: int) -> str:
    """``measure``'s figures as Markdown, with the versions and the load that they depend on."""
    (before, after), (width, narrower), (height, lower) = found["bytes"], found["width"], found["height"]
    lines = [
        f"Longest side at most {longest}, quality {quality}: {found['images']} images, "
        f"{found['kept']} of them left as they were because a new file would not be smaller.",
        "",
        "| mean | before | after | after / before |",
        "|---|--:|--:|--:|",
        f"| file | {before / 1000:.1f} KB | {after / 1000:.1f} KB | {after / before:.2f} |",
        f"| width x height | {width:.0f} x {height:.0f} | {narrower:.0f} x {lower:.0f} | |",
    ]
    for name, ratios in found["time"].items():
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(f"| time, {name} | | | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    difference = found["difference"]
    lines += [
        "",
        f"The evaluation's pixels differ by {difference['mean']:.2f} of 255 on average, {difference['worst']:.2f} in "
        f"the worst image. Times: one thread, median and quartiles of {len(ratios)} interleaved rounds, load "
        f"{os.getloadavg()[0]:.1f} at the end; Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}, "
        f"torch {torch.__version__}.",
    ]
    return "\n".join(lines)
