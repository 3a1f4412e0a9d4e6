"""Exact counts, summed on the device and divided once; metrics of test sets: class subsets, ImageNet-C's errors."""

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lip_resnet import distributed


class AccuracyCounts:
    """Correct predictions, loss and images, summed on ``device`` without a synchronisation.

    Top-5 of fewer than five classes is top-k with k the number of classes.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64; float32 counts exactly up to 2^24 images.
        self.sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def reset(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, classes), any float dtype.
            labels: (B,) int64; or (B, K) int64, any of which is correct, padded with -1.
            loss: (), the batch's mean.
        """
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        size = len(labels)
        hits = (top[:, :, None] == labels.reshape(size, 1, -1)).any(dim=2)
        self.sums[0] += hits[:, 0].sum()
        self.sums[1] += hits.any(dim=1).sum()
        self.sums[2] += loss.to(self.sums.dtype) * size
        self.sums[3] += size

    def reduce(self) -> dict[str, float]:
        """Sum over all processes: ``top1`` and ``top5`` in percent, mean ``loss``, and the counts ``correct1``,
        ``correct5`` and ``images``. Synchronises with the device."""
        correct1, correct5, loss, images = distributed.all_reduce_sum(self.sums.clone()).tolist()
        return _rates(int(correct1), int(correct5), loss, int(images))


def _rates(correct1: int, correct5: int, loss: float, images: int) -> dict[str, float]:
    divisor = images or 1.0
    return {
        "loss": loss / divisor,
        "top1": 100 * correct1 / divisor,
        "top5": 100 * correct5 / divisor,
        "correct1": correct1,
        "correct5": correct5,
        "images": images,
    }


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, classes), float32 or float64, and labels -> (): the mean of -log P(correct).

    Args:
        labels: (B,) int64; or (B, K) int64, any of which is correct, padded with -1: P is the sum over them.
    """
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    log_probabilities = F.log_softmax(logits, dim=1).gather(1, labels.clamp(min=0))
    return -log_probabilities.masked_fill(labels < 0, -torch.inf).logsumexp(dim=1).mean()


class ClassLogits(nn.Module):
    """Restricts a network's logits to some of its classes: images -> logits (B, len(classes)), in their order."""

    def __init__(self, model: nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits of the classes."""
        return self.model(images)[:, self.classes]


def corruption_errors(parts: dict[str, dict[str, float]], alexnet: dict[str, float]) -> dict[str, Any]:
    """ImageNet-C's figures from those of its parts.

    A corruption's error is the mean over its severities, its corruption error (CE) that error over AlexNet's; the mCE
    is the mean of the CEs. All in percent.

    Args:
        parts: corruption/severity -> result of ``AccuracyCounts.reduce``; each of the same number of images.
        alexnet: corruption -> AlexNet's error, a fraction, of the 15 corruptions that the mCE averages.

    Returns:
        The keys of ``AccuracyCounts.reduce``, over all images of those corruptions; ``mean_error``, 100 - top1;
        ``mce``, where every severity of each was evaluated; and ``corruptions``, each with its ``errors`` by severity,
        and ``error`` and ``ce`` where it has all five.

    Source: Hendrycks and Dietterich, ICLR 2019, section 4.
    """
    corruptions: dict[str, dict[str, Any]] = {}
    for part, result in parts.items():
        name, severity = part.split("/")
        corruptions.setdefault(name, {"errors": {}})["errors"][severity] = 100 - result["top1"]
    for name, figures in corruptions.items():
        if len(figures["errors"]) == 5:
            figures["error"] = statistics.fmean(figures["errors"].values())
            if name in alexnet:
                figures["ce"] = figures["error"] / alexnet[name]
    counted = [result for part, result in parts.items() if part.split("/")[0] in alexnet]
    correct1, correct5, images = (
        sum(int(result[key]) for result in counted) for key in ("correct1", "correct5", "images")
    )
    total = _rates(correct1, correct5, sum(result["loss"] * result["images"] for result in counted), images)
    total["mean_error"] = 100 - total["top1"]
    errors = [corruptions[name]["ce"] for name in alexnet if "ce" in corruptions.get(name, {})]
    if len(errors) == len(alexnet):
        total["mce"] = statistics.fmean(errors)
    return total | {"corruptions": corruptions}
