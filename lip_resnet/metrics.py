"""Exact counts, added on the device and divided once."""

import torch
from torch import Tensor

from lip_resnet import distributed


class Counts:
    """Correct predictions, loss and images, summed on ``device`` without a synchronisation.

    Top-5 of fewer than five classes is top-k with k the number of classes.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Start again from zero."""
        self.sums.zero_()

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch: logits (B, classes) of any float dtype, labels (B,) int64, loss () the batch's mean."""
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top == labels[:, None]
        size = len(labels)
        self.sums[0] += hits[:, 0].sum()
        self.sums[1] += hits.sum()
        self.sums[2] += loss.double() * size
        self.sums[3] += size

    def reduce(self) -> dict[str, float]:
        """Over all processes: ``top1`` and ``top5`` in percent, mean ``loss``, and the counts. Synchronises."""
        correct1, correct5, loss, images = distributed.all_reduce_sum(self.sums.clone()).tolist()
        divisor = images or 1.0
        return {
            "loss": loss / divisor,
            "top1": 100 * correct1 / divisor,
            "top5": 100 * correct5 / divisor,
            "correct1": int(correct1),
            "correct5": int(correct5),
            "images": int(images),
        }
