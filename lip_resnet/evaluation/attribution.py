"""Do maps of the pixels mean anything? Scores of every image of a set, with means and confidence intervals.

The caller passes the function that makes and scores maps (of ``insight``, which this wing does not import); here images
are read, boxes cropped and scores gathered.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from lip_resnet import distributed
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data import EvalLoader, to_device
from lip_resnet.data.transforms import eval_transform
from lip_resnet.evaluation.evaluate import autocast
from lip_resnet.evaluation.protocol import EvalConfig
from lip_resnet.evaluation.robustness import Build, Measured, Open, corners_of, default_boxes
from lip_resnet.evaluation.testsets import EvalSet

Scores = dict[str, NDArray[np.float64]]
"""Method -> (n, ...): the scores of each image."""
Score = Callable[..., Scores]
"""Called with (network, images (B, 3, H, W) uint8, labels (B,), what the probe says, mean, std)."""


def measure_deletion(
    images: Open, build: Build, config: EvalConfig, every: int | None = None, *, score: Score
) -> Measured:
    """Deletion: the area under the curve of the predicted class's probability as the image is removed, in percent.

    Args:
        every: take every Nth image of the set; None: all.
        score: method -> (B, points) in [0, 1], of a batch; its fourth argument is the indices of the images.
    """
    every = 1 if every is None else every
    if every < 1:
        raise InputError(f"--every is {every}; it must be at least 1")
    data = images(config.data)
    loader = EvalLoader(data.source, config.data)
    loader.choose(range(0, len(data.source), every))
    network = build([config.data.eval_size])
    curves = _collect(network, loader, config, score, np.array)
    areas = {name: 50 * (curve[:, 1:] + curve[:, :-1]).mean(1) for name, curve in curves.items()}
    measured: dict[str, Any] = {}
    for name, area in areas.items():
        mean, interval = mean_interval(area)
        measured[name] = {"auc": mean, "interval": interval, "curve": (100 * curves[name].mean(0)).tolist()}
    differences = {}
    for name, area in areas.items():
        if name != "importance":
            mean, interval = mean_interval(areas["importance"] - area)
            differences[name] = {"auc": mean, "interval": interval}
    result = {"images": loader.samples, "deletion": measured, "importance_less": differences}
    settings = {"name": "deletion", "every": every, "methods": sorted(areas)}
    return Measured(network, data, config, result, settings)


def measure_localisation(
    images: Open, build: Build, config: EvalConfig, boxes: Path | None = None, *, score: Score
) -> Measured:
    """Localisation: how often a map's largest value is in the object's box, and how much of the map, in percent.

    Images whose box lies outside the crop are left out, and counted as ``outside``.

    Args:
        boxes: as for ``robustness.read_corners``; by default boxes.tsv in ``data.root``.
        score: method -> (B, 2) in [0, 1], of a batch: hit and energy; its fourth argument is the pixels of the boxes
            (B, H, W).

    Raises:
        InputError: there are no boxes, they are of other images, or all lie outside the crop.
    """
    data = images(config.data)
    corners = corners_of(data, boxes or default_boxes(config))
    loader = EvalLoader(data.source, config.data)
    network = build([config.data.eval_size])
    masks = BoxMasks(data, config.data, corners)
    scores = _collect(network, loader, config, score, masks)
    inside = scores["chance"][:, 0] > 0
    if not inside.any():
        raise InputError(f"all boxes of {data.name} lie outside the crop of {config.data.eval_size} pixels")
    measured: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for name, values in scores.items():
        measured[name] = _summary(values[inside])
        if name != "importance" and not name.startswith("site "):
            differences[name] = _summary(scores["importance"][inside] - values[inside])
    counts = {"images": int(inside.sum()), "outside": int((~inside).sum())}
    result = {**counts, "localisation": measured, "importance_less": differences}
    settings = {"name": "localisation", "methods": sorted(scores)}
    return Measured(network, data, config, result, settings)


def _summary(values: NDArray[np.float64]) -> dict[str, Any]:
    """(n, 2), hit and energy -> percent, with intervals."""
    (pointing, of_pointing), (energy, of_energy) = (mean_interval(100 * column) for column in values.T)
    return {"pointing": pointing, "pointing_interval": of_pointing, "energy": energy, "energy_interval": of_energy}


class BoxMasks:
    """The boxes of images as the pixels of their crops: a mask goes the way of the image."""

    def __init__(self, data: EvalSet, config: EvalDataConfig, corners: NDArray[np.float64]) -> None:
        self.source, self.corners, self.transform = data.source, corners, eval_transform(config)

    def __call__(self, indices: range) -> NDArray[np.bool_]:
        """(B, H, W)."""
        return np.stack([self._mask(index) for index in indices])

    def _mask(self, index: int) -> NDArray[np.bool_]:
        with Image.open(io.BytesIO(self.source.read(index))) as image:
            width, height = image.size
        x0, y0, x1, y1 = self.corners[index]
        mask = np.zeros((height, width, 3), dtype=np.uint8)
        mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = 255
        return self.transform(Image.fromarray(mask))[0].numpy() > 127


def mean_interval(values: NDArray[np.float64]) -> tuple[float, list[float] | None]:
    """The mean of independent values (n,) and its 95% interval by the normal distribution; None for one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None
    width = 1.959963984540054 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, [mean - width, mean + width]


def _collect(
    network: nn.Module, loader: EvalLoader, config: EvalConfig, score: Score, about: Callable[[range], NDArray[Any]]
) -> Scores:
    """The scores of every image, in the set's order, on every process. A collective.

    Args:
        about: indices of a batch -> the fourth argument of ``score``.

    Raises:
        FloatingPointError: scores of an image are not finite.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for indices, (images, labels) in zip(loader.batches, loader, strict=True):
        images, labels = to_device(images, device, config.channels_last), labels.reshape(len(labels), -1)[:, 0]
        with autocast(device, config.precision):
            scores = score(network, images, labels, about(indices), config.data.mean, config.data.std)
        parts.append((np.array(indices), scores))
    gathered = [part for of_process in distributed.gather_objects(parts) for part in of_process]
    order = np.argsort(np.concatenate([indices for indices, _ in gathered]))
    joined = {name: np.concatenate([scores[name] for _, scores in gathered])[order] for name in gathered[0][1]}
    if bad := sum(int((~np.isfinite(values)).any(1).sum()) for values in joined.values()):
        raise FloatingPointError(f"{bad} scores of {len(order)} images are not finite, in {config.precision}")
    return joined
