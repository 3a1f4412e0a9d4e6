"""The evaluation of a detector: its detections on a set, gathered from all processes, and COCO's average precision."""

import contextlib
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils import distribute_bn
from torch import Tensor, nn

from lip_resnet import distributed, memory
from lip_resnet.compat import tree_leaves
from lip_resnet.config import InputError
from lip_resnet.detection.annotations import numbers
from lip_resnet.detection.canvas import Sizes, prepare
from lip_resnet.detection.loaders import DetectionEvalLoader
from lip_resnet.detection.samples import DetectionSource
from lip_resnet.evaluation.average_precision import METRICS, average_precision
from lip_resnet.evaluation.evaluate import autocast, explain_memory, progress_bar
from lip_resnet.evaluation.matching import Detections, match
from lip_resnet.evaluation.nonfinite import FirstNonFinite
from lip_resnet.files import to_json, write_text

try:
    import faster_coco_eval
except ImportError:
    faster_coco_eval = None


def evaluate(
    model: nn.Module,
    loader: DetectionEvalLoader,
    *,
    precision: str,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, float]:
    """``METRICS`` in percent over every image once, and ``images``; the same on any number of processes. A collective.

    Arguments and errors as for ``detect``.
    """
    detections = detect(model, loader, precision=precision, channels_last=channels_last, mean=mean, std=std)
    source = loader.source
    metrics = distributed.on_main(lambda: coco_metrics(source.ground_truth(), detections))
    return {**metrics, "images": len(source)}


@torch.inference_mode()
def detect(
    model: nn.Module,
    loader: DetectionEvalLoader,
    *,
    precision: str,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Detections:
    """The detections on every image of the loader's set, in the set's order, on every process. A collective.

    Runs on the device of the model's parameters, with rank 0's batch norm buffers, and restores the training mode.

    Args:
        model: a ``Detector``; not wrapped in DDP.
        precision: of the autocast forward: float32, tf32, bfloat16 or float16.
        channels_last: memory format of the images, on MPS always contiguous.
        mean, std: (3,), of pixels in [0, 1].

    Raises:
        FloatingPointError: on every process, if an output of a module is not finite on an image; names the module.
        OutOfMemory: a batch does not fit; says how many images do.
    """
    if distributed.world_size() > 1:
        distribute_bn(model, distributed.world_size(), reduce=False)
    device = next(model.parameters()).device
    pixel_mean, pixel_std = (torch.tensor(values, device=device) for values in (mean, std))
    was_training = model.training
    model.eval()

    def forward(images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        inputs = prepare(images, sizes, device, channels_last, pixel_mean, pixel_std)
        with autocast(device, precision):
            return model(inputs, sizes)

    source, failed = loader.source, ""
    columns: list[tuple[NDArray[Any], ...]] = []
    with _FiniteOutputs(model) as outputs_of_modules, progress_bar(len(source)) as bar:
        for indices, (images, sizes) in zip(loader.batches, loader, strict=True):
            with memory.explained(functools.partial(explain_memory, forward, (images, sizes), device)):
                outputs = forward(images, sizes)
            if not outputs_of_modules.finite() and not failed:
                with FirstNonFinite(model) as first:
                    forward(images, sizes)
                failed = f"the first, near {source.path(indices[0])}: {first.name or 'nothing, when run again'}"
            for index, size, output in zip(indices, sizes, outputs, strict=True):
                columns.append(_to_original(source, index, size, output))
            bar.update(min(len(indices) * distributed.world_size(), len(source) - bar.n))
    model.train(was_training)
    causes = [cause for cause in distributed.gather_objects(failed) if cause]
    if causes:
        raise FloatingPointError(f"outputs of the detector are not finite, in {precision}; {causes[0]}")
    return _gather(columns, source)


class _FiniteOutputs(contextlib.ExitStack):
    """Within this context, looks at the outputs of a detector's parts: boxes that are not finite are never returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._flags: list[Tensor] = []
        for name, module in model.named_modules():
            if name.count(".") <= 1:  # backbone.fpn, rpn.head, roi_heads.box_predictor, ...
                self.callback(module.register_forward_hook(self._look).remove)

    def _look(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = (each for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point())
        self._flags += [each.isfinite().all() for each in tensors]

    def finite(self) -> bool:
        """Whether all outputs since the last call were finite; waits for the device."""
        flags, self._flags = self._flags, []
        return all(torch.stack(flags).tolist()) if flags else True


def _to_original(
    source: DetectionSource, index: int, size: tuple[int, int], output: dict[str, Tensor]
) -> tuple[NDArray[Any], ...]:
    """An image's detections: index, labels from 0, boxes x, y, width, height in pixels of the original, scores."""
    height, width = (int(side) for side in source.sizes[index])
    boxes = output["boxes"].cpu().double().numpy() * np.array([width / size[1], height / size[0]] * 2)
    boxes[:, 2:] -= boxes[:, :2]
    labels = output["labels"].cpu().numpy() - 1
    return np.full(len(boxes), index), labels, boxes, output["scores"].cpu().double().numpy()


def _gather(columns: list[tuple[NDArray[Any], ...]], source: DetectionSource) -> Detections:
    """The detections of all processes, in the order of the set."""
    own = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    index, labels, boxes, scores = (
        np.concatenate(parts) for parts in zip(*filter(None, distributed.gather_objects(own)), strict=True)
    )
    order = np.argsort(index, kind="stable")
    image_ids, category_ids = np.array(source.image_ids), np.array(source.category_ids)
    return Detections(image_ids[index][order], category_ids[labels][order], boxes[order], scores[order])


def to_results(detections: Detections) -> list[dict[str, Any]]:
    """COCO's form of results: ``image_id``, ``category_id``, ``bbox`` and ``score`` of every detection."""
    columns = (column.tolist() for column in detections)
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(*columns, strict=True)
    ]


def write_results(path: Path, detections: Detections) -> None:
    """Write a JSON file in COCO's form of results.

    Raises:
        InputError: it cannot be written.
    """
    write_text(path, to_json(to_results(detections)) + "\n")


def read_results(path: Path) -> Detections:
    """Read a JSON file in COCO's form of results, of any program.

    Raises:
        InputError: it cannot be read, or is not of this form.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results, list):
            raise ValueError(f"it holds a {type(results).__name__}")
        columns = [[each[key] for each in results] for key in ("image_id", "category_id", "bbox", "score")]
        image_ids, category_ids = (numbers(each, "i") for each in columns[:2])
        boxes, scores = (numbers(each, "if").astype(np.float64) for each in columns[2:])
        detections = Detections(image_ids, category_ids, boxes.reshape(-1, 4), scores)
        if len(detections.boxes) != len(scores) or not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError("boxes or scores are not finite numbers")
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        needed = "a list of {image_id, category_id, bbox: [x, y, width, height], score}"
        raise InputError(f"{path}: not detections in COCO's form, {needed}: {error}") from error
    return detections


def coco_metrics(ground_truth: dict[str, Any], detections: Detections) -> dict[str, float]:
    """``METRICS`` in percent, NaN where the set has no such objects: by faster-coco-eval, or without it by ours.

    Both equal pycocotools; ours is printed as a note.

    Args:
        ground_truth: in COCO's form; its annotations are changed.
    """
    if faster_coco_eval is None:
        line = 'faster-coco-eval is not installed (pip install "lip-resnet[detection]"): AP by this project\'s own code'
        print(f"note: {line}", file=sys.stderr, flush=True)
        return average_precision(match(ground_truth, detections))
    results = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(to_results(detections), 1)
    ]
    truth = faster_coco_eval.COCO(ground_truth)
    evaluation = faster_coco_eval.COCOeval_faster(
        truth, faster_coco_eval.COCO({**ground_truth, "annotations": results}), "bbox"
    )
    evaluation.run()
    values = [100 * value if value >= 0 else math.nan for value in evaluation.stats[: len(METRICS)].tolist()]
    return dict(zip(METRICS, values, strict=True))
