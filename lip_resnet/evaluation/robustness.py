"""Robustness probes of a network: shift consistency, accuracy against test resolution, accuracy by object size.

A probe opens its images, builds the network, and returns what a row records. Corruptions are the test set imagenet-c.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from lip_resnet import seeding
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data import EvalLoader
from lip_resnet.data.fingerprint import names_of
from lip_resnet.data.sources.base import Encoded, Label, Samples, name_sample, prefetch_samples
from lip_resnet.data.transforms import eval_transform
from lip_resnet.evaluation.evaluate import evaluate_set
from lip_resnet.evaluation.predictions import PredictionLog
from lip_resnet.evaluation.protocol import EvalConfig, adapt
from lip_resnet.evaluation.testsets import EvalSet, Joined

Open = Callable[[EvalDataConfig], EvalSet]
"""Opens the set of images, to be resized and cropped so."""
Build = Callable[[Sequence[int]], nn.Module]
"""Builds the network on its device, and checks that it takes images of these sizes (pixels)."""

SIZES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Default test sizes, relative to the recipe's."""
BOX_COLUMNS = ["file", "x0", "y0", "x1", "y1"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a probe has measured."""

    network: nn.Module
    data: EvalSet
    config: EvalConfig
    """Resizing and crop, as the row's protocol names them."""
    result: dict[str, Any]
    """Keys of the row."""
    settings: dict[str, Any]
    """Of the probe: part of the row's protocol."""


def measure_shift(images: Open, build: Build, config: EvalConfig, seed: int = 0) -> Measured:
    """Shift consistency: the share of images whose top-1 is the same for two random crops, right or wrong.

    Images are cropped at the centre to eval_size + s pixels, s = 32 of 224 in proportion, after a resize that is large
    enough for it. The crops' offsets are 0 to s - 1 in each direction, drawn from ``seed`` and the image's index.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019, section 4.
    """
    size = config.data.eval_size
    shift = shift_of(size)
    resize = max(config.data.eval_resize, size + shift)
    whole = config.data.model_copy(update={"eval_size": size + shift, "eval_resize": resize})
    data = images(whole)
    crops = ShiftedCrops(data.source, whole, shift, seed)
    loader, log = EvalLoader(crops, whole), PredictionLog()
    network = build([size])
    pairs = dataclasses.replace(data, source=crops, parts={"": range(len(crops))})
    result = evaluate_set(network, pairs, loader, config, predictions=log)
    top1 = log.gather().top[:, 0]
    agreeing, count = int((top1[::2] == top1[1::2]).sum()), len(data.source)
    measured = {
        "images": count,
        "agreeing": agreeing,
        "consistency": 100 * agreeing / count,
        "interval": wilson(agreeing, count),
        "top1_of_crops": result["top1"],
    }
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval_resize": resize})})
    settings = {"name": "shift", "shift": shift, "seed": seed}
    return Measured(network, data, config, measured, settings)


def shift_of(size: int) -> int:
    """32 pixels of 224 in proportion, for images of ``size`` pixels; at least 2."""
    return max(2, round(size * 32 / 224))


class ShiftedCrops(Dataset):
    """Two random crops of every image of a set: samples 2 i and 2 i + 1 are of image i.

    Args:
        config: resizing and crop of the whole image, of which a crop is ``shift`` pixels smaller.
        shift: offsets are 0 to ``shift`` - 1 pixels.
        seed: of the offsets.
    """

    def __init__(self, source: Samples, config: EvalDataConfig, shift: int, seed: int) -> None:
        self.source, self.transform, self.shift, self.seed = source, eval_transform(config), shift, seed
        self.size = config.eval_size - shift
        self._last: tuple[int, Tensor, Label] | None = None

    def __len__(self) -> int:
        return 2 * len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Label]:
        number, second = divmod(index, 2)
        if self._last is None or self._last[0] != number:
            image, label = self.source[number]
            self._last = number, image if isinstance(image, Tensor) else self.transform(image), label
        _, pixels, label = self._last
        top, left = self.offsets(number)[second]
        return pixels[:, top : top + self.size, left : left + self.size], label

    def offsets(self, number: int) -> list[list[int]]:
        """[[top, left], [top, left]] of the two crops of an image."""
        generator = np.random.default_rng(seeding.derive("shift", self.seed, number))
        return generator.integers(0, self.shift, (2, 2)).tolist()

    def prefetch(self, indices: Sequence[int]) -> None:
        """Announce a batch."""
        prefetch_samples(self.source, list(dict.fromkeys(index // 2 for index in indices)))

    def path(self, index: int) -> str:
        """An image's name."""
        return name_sample(self.source, index // 2)


def measure_sizes(images: Open, build: Build, config: EvalConfig, sizes: Sequence[int] = ()) -> Measured:
    """Accuracy at each test size, with the resize in the recipe's proportion, as eval.py --size.

    Args:
        sizes: sides of the centre crop, pixels; by default ``SIZES`` times the recipe's.
    """
    sizes = sorted(set(sizes)) or [round(config.data.eval_size * factor) for factor in SIZES]
    configs = [adapt(config, eval_size=size)[0] for size in sizes]
    sets = [images(each.data) for each in configs]
    loader = EvalLoader(Joined(sets), config.data)
    network = build(sizes)
    measured, start = [], 0
    for data, each in zip(sets, configs, strict=True):
        result = evaluate_set(network, data, loader, each, start)
        start += len(data.source)
        interval = wilson(result["correct1"], result["images"])
        measured.append({"size": each.data.eval_size, "resize": each.data.eval_resize, **result, "interval": interval})
    settings = {"name": "sizes", "sizes": list(sizes)}
    return Measured(network, sets[0], config, {"images": len(sets[0].source), "sizes": measured}, settings)


def measure_objects(images: Open, build: Build, config: EvalConfig, boxes: Path | None = None) -> Measured:
    """Accuracy by the size of the object: images in terciles of the area of their boxes, pixels of the image's file.

    Small is up to the first tercile, large above the second. Equal areas are in one group: groups may differ in size.

    Args:
        boxes: as for ``read_boxes``; by default boxes.tsv in ``data.root``.

    Raises:
        InputError: there are no boxes, or they are of other images.
    """
    data = images(config.data)
    areas = areas_of(data, boxes or default_boxes(config))
    loader, log = EvalLoader(data.source, config.data), PredictionLog()
    network = build([config.data.eval_size])
    result = evaluate_set(network, data, loader, config, predictions=log)
    right = log.gather().right
    ordered, total = np.sort(areas), len(areas)
    first, second = float(ordered[-(-total // 3) - 1]), float(ordered[-(-2 * total // 3) - 1])
    groups = {"small": areas <= first, "medium": (areas > first) & (areas <= second), "large": areas > second}
    measured: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        count, correct = int(group.sum()), int(right[group].sum())
        measured[name] = {"images": count, "correct1": correct}
        if count:
            measured[name] |= {"top1": 100 * correct / count, "interval": wilson(correct, count)}
    settings = {"name": "objects", "terciles": [first, second]}
    return Measured(network, data, config, {**result, "objects": measured}, settings)


def default_boxes(config: EvalConfig) -> Path:
    """Where the boxes of a set lie: boxes.tsv in ``data.root``."""
    return Path(config.data.root or ".").expanduser() / "boxes.tsv"


def read_corners(path: Path) -> dict[str, tuple[float, float, float, float]]:
    """x0, y0, x1, y1 of the box of each file, in pixels: a tab-separated table with the columns ``BOX_COLUMNS``.

    Raises:
        InputError: it cannot be read, or is not such a table, or has two boxes of one file.
    """
    columns = ", ".join(BOX_COLUMNS)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t")
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the boxes: {error.strerror}; --boxes names a table of {columns}"
        ) from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a tab-separated table of {columns}") from error
    if header != BOX_COLUMNS:
        raise InputError(f"{path}: its columns are {', '.join(header)}; they must be {columns}, with tabs between")
    corners: dict[str, tuple[float, float, float, float]] = {}
    for number, row in enumerate(rows, 2):
        try:
            name, x0, y0, x1, y1 = row[0], *map(float, row[1:])
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: line {number} is not a file's name and four numbers") from error
        if not (0 <= x0 <= x1 < math.inf and 0 <= y0 <= y1 < math.inf):
            raise InputError(f"{path}: line {number}: {name} has no box from x0, y0 to x1, y1: {', '.join(row[1:])}")
        if name in corners:
            raise InputError(f"{path}: line {number}: a second box of {name}; give one box an image")
        corners[name] = x0, y0, x1, y1
    return corners


def read_boxes(path: Path) -> dict[str, float]:
    """The area of the box of each file, square pixels; as ``read_corners``."""
    return {name: (x1 - x0) * (y1 - y0) for name, (x0, y0, x1, y1) in read_corners(path).items()}


def corners_of(data: EvalSet, path: Path) -> np.ndarray:
    """(n, 4): x0, y0, x1, y1 of the box of each image of a set, in its order.

    Files are named from the split's folder, or from the one above it.

    Raises:
        InputError: as ``read_corners``; the set's images have no names, or there is no box of one.
    """
    if not isinstance(data.source, Encoded):
        raise InputError(f"boxes belong to image files; {data.name} has none")
    names = [name.decode(errors="surrogateescape") for name in names_of(data.source)]
    boxes, split = read_corners(path), Path(data.source.root).name
    corners = [boxes.get(f"{split}/{name}", boxes.get(name)) for name in names]
    missing = [name for name, box in zip(names, corners, strict=True) if box is None]
    if missing:
        raise InputError(
            f"{path}: no box of {len(missing)} of {len(names)} images, the first is {missing[0]}: boxes of other images"
        )
    return np.array(corners, dtype=float)


def areas_of(data: EvalSet, path: Path) -> np.ndarray:
    """(n,): the area of the box of each image of a set, in its order; as ``corners_of``."""
    x0, y0, x1, y1 = corners_of(data, path).T
    return (x1 - x0) * (y1 - y0)


def wilson(count: int, images: int) -> tuple[float, float]:
    """95% interval of a share, in percent. Source: Wilson, J. American Statistical Association 22 (1927)."""
    z = 1.959963984540054
    share = count / images
    centre, width = share + z * z / (2 * images), z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    scale = 100 / (1 + z * z / images)
    return max(0.0, scale * (centre - width)), min(100.0, scale * (centre + width))


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a probe's row, or of eval.py's row of imagenet-c, by their names in a table; all in percent."""
    if "consistency" in row:
        return {"shift consistency": row["consistency"]}
    if "sizes" in row:
        return {f"top-1 at {each['size']} pixels": each["top1"] for each in row["sizes"]}
    if "objects" in row:
        return {f"top-1 of {name} objects": each["top1"] for name, each in row["objects"].items() if "top1" in each}
    if "deletion" in row:
        return {f"deletion AUC, {method}": each["auc"] for method, each in row["deletion"].items()}
    if "localisation" in row:
        methods = {name: each for name, each in row["localisation"].items() if not name.startswith("site ")}
        measured = {f"energy in the box, {name}": each["energy"] for name, each in methods.items()}
        return measured | {f"pointing game, {name}": each["pointing"] for name, each in methods.items()}
    return {name: row[key] for name, key in (("ImageNet-C mean error", "mean_error"), ("mCE", "mce")) if key in row}


def read_probe(path: Path) -> dict[str, Any]:
    """A probe's row, or eval.py's of imagenet-c.

    Raises:
        InputError: it cannot be read, or is no such row.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not a row of probe.py: {error}") from error
    return check_probe(row, str(path))


def check_probe(row: Any, source: str) -> dict[str, Any]:
    """A probe's row as it was given.

    Args:
        row: parsed JSON.
        source: its file, for messages.

    Raises:
        InputError: it is no such row.
    """
    try:
        values = figures(row).values()
        if values and all(map(math.isfinite, values)) and isinstance(row["protocol"], dict):
            return row
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: not a row of probe.py: {error}") from error
    raise InputError(f"{source}: not a row of probe.py")
