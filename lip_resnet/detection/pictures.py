"""Detections over their images: right and false ones, and the objects that were missed; by matplotlib, an option."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.detection.canvas import canvas, prepare, resize, resized
from lip_resnet.detection.samples import DetectionSource
from lip_resnet.evaluation.matching import AREAS
from lip_resnet.insight import figures

IOU = 0.5
"""Least intersection over union of a right detection."""
SIZES = ("small", "medium", "large")
_COLOURS = {"right": "#35c46a", "false": "#ff5a36", "missed": "#3aa0ff"}


@dataclass(frozen=True)
class Judged:
    """The detections and objects of one image; boxes are x1, y1, x2, y2 in pixels of the original image."""

    boxes: NDArray[np.float64]
    """(n, 4), by falling score."""
    labels: NDArray[np.int64]
    """(n,)"""
    scores: NDArray[np.float64]
    """(n,)"""
    right: NDArray[np.bool_]
    """(n,): whether a detection has taken an object of its class, at ``IOU``."""
    objects: NDArray[np.float32]
    """(g, 4)"""
    object_labels: NDArray[np.int64]
    """(g,)"""
    detected: NDArray[np.bool_]
    """(g,)"""

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Size -> objects, of these detected, and false detections; by the areas of boxes."""
        of_objects, of_false = _sizes(self.objects), _sizes(self.boxes[~self.right])
        return {
            size: (
                int((of_objects == at).sum()),
                int(self.detected[of_objects == at].sum()),
                int((of_false == at).sum()),
            )
            for at, size in enumerate(SIZES)
        }


def _sizes(boxes: NDArray[Any]) -> NDArray[np.int64]:
    """(n,): index in ``SIZES`` of each box."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.digitize(sides[:, 0] * sides[:, 1], [AREAS["small"][1], AREAS["medium"][1]], right=True)


@torch.inference_mode()
def detect_image(
    model: nn.Module, image: Image.Image, data: EvalDetectionDataConfig, channels_last: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Boxes (n, 4) in pixels of the image, labels from 0 and scores (n,), by falling score, as in an evaluation."""
    device = next(model.parameters()).device
    height, width = resized(image.height, image.width, data.size, data.max_size)
    padded = torch.zeros((1, *canvas(height, width), 3), dtype=torch.uint8)
    padded[0, :height, :width] = torch.from_numpy(resize(image, height, width).copy())
    mean, std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
    sizes = [(height, width)]
    inputs = prepare(padded.permute(0, 3, 1, 2), sizes, device, channels_last, mean, std)
    was_training = model.training
    model.eval()
    output: dict[str, Tensor] = model(inputs, sizes)[0]
    model.train(was_training)
    scale = np.array([image.width / width, image.height / height] * 2)
    boxes, scores = output["boxes"].cpu().double().numpy() * scale, output["scores"].cpu().double().numpy()
    order = np.argsort(-scores, kind="stable")
    return boxes[order], output["labels"].cpu().numpy()[order] - 1, scores[order]


def judge(
    boxes: NDArray[np.float64],
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    source: DetectionSource,
    index: int,
) -> Judged:
    """Sort out the detections of image ``index``, by falling score: each takes the free object that it covers best."""
    objects, object_labels = source.annotations(index)
    right, detected = np.zeros(len(boxes), dtype=bool), np.zeros(len(objects), dtype=bool)
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        sides = np.maximum(np.minimum(box[2:], objects[:, 2:]) - np.maximum(box[:2], objects[:, :2]), 0)
        shared = sides[:, 0] * sides[:, 1]
        areas = [np.prod(each[..., 2:] - each[..., :2], axis=-1) for each in (box, objects)]
        overlap = np.where(
            detected | (object_labels != label), 0, shared / np.maximum(areas[0] + areas[1] - shared, 1e-9)
        )
        if len(objects) and overlap.max() >= IOU:
            right[number] = detected[np.argmax(overlap)] = True
    return Judged(boxes, labels, scores, right, objects, object_labels, detected)


def describe(judged: Judged) -> str:
    """One line: what was detected, missed and false, and by size."""
    sizes = [
        f"{size} {detected}/{objects}" + f" and {false} false" * bool(false)
        for size, (objects, detected, false) in judged.counts().items()
        if objects or false
    ]
    detected, false = int(judged.detected.sum()), int((~judged.right).sum())
    return f"{detected} of {len(judged.detected)} objects detected, {false} false ({', '.join(sizes) or 'none'})"


def draw(image: Image.Image, judged: Judged, classes: Sequence[str], heading: str) -> Figure:
    """An image with its boxes; call it, and save its figure, within ``insight.figures.style``."""
    scale = 8 / max(image.size)
    figure = Figure(figsize=(max(image.width * scale, 4.5), image.height * scale + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.imshow(np.asarray(image))
    add_boxes(axes, judged, classes)
    styles = {"right": "-", "false": "-", "missed": "--"}
    lines = [Line2D([], [], color=_COLOURS[name], ls=style, lw=2) for name, style in styles.items()]
    figure.legend(lines, ["right detection", "false detection", "missed object"], loc="outside lower center", ncols=3)
    figure.suptitle(f"{heading}\n{describe(judged)}", fontsize="medium", parse_math=False)
    return figure


def add_boxes(axes: Axes, judged: Judged, classes: Sequence[str], width: float = 1.8) -> None:
    """Draw boxes into axes in pixels of the image; with a name and score each, unless ``classes`` is empty."""

    def add(box: NDArray[Any], kind: str, style: str, text: str) -> None:
        x1, y1, x2, y2 = (float(value) for value in box)
        corner, sides = (x1 - 0.5, y1 - 0.5), (x2 - x1, y2 - y1)
        axes.add_patch(Rectangle(corner, *sides, fill=False, ec="black", lw=1.7 * width, alpha=0.5))
        axes.add_patch(Rectangle(corner, *sides, fill=False, ec=_COLOURS[kind], lw=width, ls=style))
        if text:
            # Above a detection and below a missed object; within the box where there is no room.
            upper, lower = sorted(axes.get_ylim())
            room = 0.04 * (lower - upper)
            at, above = (y2, y2 > lower - room) if kind == "missed" else (y1, y1 > upper + room)
            axes.text(
                corner[0],
                at - 0.5,
                text,
                fontsize="x-small",
                color="black",
                va="bottom" if above else "top",
                clip_on=True,
                parse_math=False,
                bbox={"facecolor": _COLOURS[kind], "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            )

    for box, label, detected in zip(judged.objects, judged.object_labels, judged.detected, strict=True):
        if not detected:
            add(box, "missed", "--", classes[label] if classes else "")
    for box, label, score, right in zip(judged.boxes, judged.labels, judged.scores, judged.right, strict=True):
        add(box, "right" if right else "false", "-", f"{classes[label]} {score:.2f}" if classes else "")


def build_monitor(
    source: DetectionSource, data: EvalDetectionDataConfig, channels_last: bool, count: int, score: float = 0.3
) -> Callable[[nn.Module], tuple[dict[str, float], dict[str, NDArray[np.uint8]]]]:
    """What shows the detections of a network, above a score, on ``count`` images of a set: for ``train.log_images``."""
    chosen = [(index, source[index]) for index in evenly(len(source), count)]

    def observe(network: nn.Module) -> tuple[dict[str, float], dict[str, NDArray[np.uint8]]]:
        pictures = {}
        for number, (index, image) in enumerate(chosen):
            boxes, labels, scores = detect_image(network, image, data, channels_last)
            shown = scores >= score
            judged = judge(boxes[shown], labels[shown], scores[shown], source, index)
            with figures.style():
                figure = draw(image, judged, source.classes, source.path(index).rpartition("/")[2])
                pictures[f"detections/{number}"] = figures.to_pixels(figure)
        return {}, pictures

    return observe


def evenly(images: int, count: int) -> list[int]:
    """Up to ``count`` indices of a set, evenly spaced and always the same."""
    return sorted({index * images // count for index in range(min(count, images))} if count < images else range(images))
