"""COCO's average precision of a detector on a set of images, over all processes."""

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from lip_resnet import distributed
from lip_resnet.detection.canvas import prepare
from lip_resnet.detection.loaders import DetectionEvalLoader
from lip_resnet.detection.samples import DetectionSource
from lip_resnet.evaluation.evaluate import autocast

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DetectionEvalLoader,
    *,
    precision: str,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, float]:
    """``METRICS`` in percent over every image once; NaN where no box is of that size."""
    if distributed.world_size() > 1:
        distribute_bn(model, distributed.world_size(), reduce=False)
    device = next(model.parameters()).device
    pixel_mean, pixel_std = (torch.tensor(values, device=device) for values in (mean, std))
    was_training = model.training
    model.eval()
    detections: list[dict[str, Any]] = []
    for indices, (images, sizes) in zip(loader.batches, loader, strict=True):
        images = prepare(images, sizes, device, channels_last, pixel_mean, pixel_std)
        with autocast(device, precision):
            results = model(images, sizes)
        for index, (height, width), result in zip(indices, sizes, results, strict=True):
            detections += to_coco(loader.source, index, height, width, result)
    model.train(was_training)
    gathered = [each for part in distributed.gather_objects(detections) for each in part]
    return distributed.on_main(lambda: compute(loader.source.ground_truth(), gathered))


def to_coco(source: DetectionSource, index: int, height: int, width: int, result: dict[str, Tensor]) -> list[dict]:
    """An image's detections in COCO's form."""
    original_height, original_width = source.sizes[index].tolist()
    scale = torch.tensor([original_width / width, original_height / height] * 2)
    boxes = result["boxes"].float().cpu() * scale
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": source.image_ids[index],
            "category_id": source.category_ids[label - 1],
            "bbox": box,
            "score": score,
        }
        for box, label, score in zip(boxes.tolist(), result["labels"].tolist(), result["scores"].tolist(), strict=True)
    ]


def compute(ground_truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float]:
    """``METRICS`` of detections in COCO's form."""
    from faster_coco_eval import COCO, COCOeval_faster

    with redirect_stdout(io.StringIO()):
        truth = COCO(ground_truth)
        evaluation = COCOeval_faster(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: 100 * value if value >= 0 else math.nan
        for name, value in zip(METRICS, evaluation.stats[:6].tolist(), strict=True)
    }
