"""For prepare_imagenet.py: re-encoding of images as smaller JPEG files, and its effect on sizes, pixels and time."""

import io
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class _File(NamedTuple):
    path: str
    before: bytes
    after: bytes


def measure(folder: Path, encode: Callable[[bytes, str], bytes], rounds: int) -> dict[str, Any]:
    """Measure what re-encoding does to the images below a folder.

    Times are of one thread, files in memory. Each round shuffles the files and times each original and its re-encoded
    file one after the other, in alternating order.

    Args:
        encode: (a file's bytes, its path) -> the re-encoded file's bytes.
        rounds: how many are timed, after one that is not.

    Returns:
        ``images``; ``kept``: files not re-encoded, because that would not make them smaller; ``bytes``, ``width`` and
        ``height``: means [before, after]; ``difference``: mean absolute difference of the evaluation's pixels (0 to
        255), ``mean`` over the images and ``worst`` image; ``time``: operation -> time after / before of each round.

    Raises:
        InputError: the folder has no images, or one does not decode.
    """
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise InputError(f"--effect {folder} holds no images")
    files = []
    for path in paths:
        data = read_file(path)
        files.append(_File(path, data, encode(data, path)))
    sizes = [[decode_exact(data, file.path).size for data in (file.before, file.after)] for file in files]
    config = DataConfig(root=str(folder), batch_size=1)
    evaluation = eval_transform(config)
    differences = []
    for file in files:
        before, after = (evaluation(decode_exact(data, file.path)).int() for data in (file.before, file.after))
        differences.append((before - after).abs().double().mean().item())
    return {
        "images": len(files),
        "kept": sum(file.after is file.before for file in files),
        "bytes": [
            statistics.fmean(len(file.before) for file in files),
            statistics.fmean(len(file.after) for file in files),
        ],
        "width": [statistics.fmean(both[which][0] for both in sizes) for which in (0, 1)],
        "height": [statistics.fmean(both[which][1] for both in sizes) for which in (0, 1)],
        "difference": {"mean": statistics.fmean(differences), "worst": max(differences)},
        "time": {name: _ratios(files, work, rounds) for name, work in _work(config, evaluation).items()},
    }


def _work(config: DataConfig, evaluation: v2.Transform) -> dict[str, Callable[[_File, bytes], Any]]:
    """The timed operations: from a file's bytes to pixels of 224x224."""
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
        seconds = {"before": 0.0, "after": 0.0}
        for file in shuffle.sample(files, len(files)):
            for which in ("before", "after") if number % 2 else ("after", "before"):
                data = file.before if which == "before" else file.after
                start = time.perf_counter()
                work(file, data)
                seconds[which] += time.perf_counter() - start
        if number:  # the first round is a warm-up
            ratios.append(seconds["after"] / seconds["before"])
    return ratios


def render(result: dict[str, Any], longest: int, quality: int) -> str:
    """The result of ``measure`` as Markdown, with versions and machine load."""
    (before, after), (width, narrower), (height, lower) = result["bytes"], result["width"], result["height"]
    lines = [
        f"Longest side at most {longest}, quality {quality}: {result['images']} images, "
        f"{result['kept']} of them kept as they are because the new file would not be smaller.",
        "",
        "| mean | before | after | after / before |",
        "|---|--:|--:|--:|",
        f"| file | {before / 1000:.1f} KB | {after / 1000:.1f} KB | {after / before:.2f} |",
        f"| width x height | {width:.0f} x {height:.0f} | {narrower:.0f} x {lower:.0f} | |",
    ]
    for name, ratios in result["time"].items():
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(f"| time, {name} | | | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    difference = result["difference"]
    lines += [
        "",
        f"The evaluation's pixels differ by {difference['mean']:.2f} of 255 on average, {difference['worst']:.2f} in "
        f"the worst image. Times: one thread, median and quartiles of {len(ratios)} interleaved rounds, load "
        f"{os.getloadavg()[0]:.1f} at the end; Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}, "
        f"torch {torch.__version__}.",
    ]
    return "\n".join(lines)
