"""Detection as a task of the engine: batches of padded images and boxes to losses, and the evaluation."""

from typing import Any

import torch
from torch import Tensor, nn

from lip_resnet import distributed, seeding
from lip_resnet.config import DetectionConfig
from lip_resnet.data import to_device
from lip_resnet.detection.canvas import canvas, prepare
from lip_resnet.detection.evaluate import METRICS, evaluate
from lip_resnet.detection.loaders import DetectionEvalLoader
from lip_resnet.detection.models import Detector
from lip_resnet.evaluation.evaluate import autocast


class LossCounts:
    """Sums of every loss over images, on ``device`` without a synchronisation."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(len(names) + 1, dtype=dtype, device=device)

    def reset(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()

    def add(self, losses: Tensor, images: int) -> None:
        """Add a part of a batch: its mean losses (names,) and its number of images."""
        self.sums[:-1] += losses.to(self.sums.dtype) * images
        self.sums[-1] += images

    def reduce(self) -> dict[str, float]:
        """Over all processes: the mean of every loss, of their sum ``loss``, and the number of ``images``. Synchronises
        with the device."""
        *sums, images = distributed.all_reduce_sum(self.sums.clone()).tolist()
        means = [value / (images or 1.0) for value in sums]
        return {"loss": sum(means), **dict(zip(self.names, means, strict=True)), "images": int(images)}


class Detection:
    """Detection, see ``training.task.Task``. The targets of a part are those of ``DetectionTrainLoader``.

    Args:
        detector: the network, for the names of its losses.
        device: of the network.
        val_loader: the validation set, for ``evaluate``.
    """

    metrics = METRICS
    best = "AP"
    freeze_epochs = 0
    least_images = 1

    def __init__(
        self,
        config: DetectionConfig,
        detector: Detector,
        device: torch.device,
        val_loader: DetectionEvalLoader | None = None,
    ) -> None:
        self.config, self.device, self.val_loader = config, device, val_loader
        self.losses = detector.loss_names
        self.logged = ("loss", *self.losses)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.data.mean, config.data.std))

    def new_counts(self, device: torch.device) -> LossCounts:
        """As ``Task``'s."""
        return LossCounts(self.losses, device)

    def forward(
        self, network: nn.Module, images: Tensor, targets: dict[str, Any], step: int, part: int
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """As ``Task``'s; counts are made of the losses (names,) and the number of images.

        torchvision samples anchors and proposals with the global generators of the CPU or GPU.
        """
        train, sizes = self.config.train, targets["sizes"]
        images = prepare(images, sizes, self.device, train.channels_last, self.mean, self.std)
        boxes = [
            {"boxes": to_device(boxes, self.device), "labels": to_device(labels, self.device)}
            for boxes, labels in zip(targets["boxes"], targets["labels"], strict=True)
        ]
        seeding.reseed_device(self.device, seeding.derive("device", train.seed, step, distributed.rank(), part))
        with autocast(self.device, train.precision):
            losses = network(images, sizes, boxes)
        values = torch.stack([losses[name].float() for name in self.losses])
        return values.sum(), (values.detach(), len(images))

    def blank(self, images: int, largest: bool) -> tuple[Tensor, dict[str, Any]]:
        """As ``Task``'s: square images, or of the longest side, with one box."""
        data = self.config.data
        sides = (data.size, data.max_size if largest else data.size)
        box = torch.tensor([[0.0, 0.0, sides[1], sides[0]]])
        labels = torch.ones(1, dtype=torch.int64)
        targets = {"sizes": [sides] * images, "boxes": [box] * images, "labels": [labels] * images}
        return torch.zeros(images, 3, *canvas(*sides), dtype=torch.uint8), targets

    def remark(self, best: float) -> str | None:
        """As ``Task``'s: nothing, as no AP of a shipped recipe's own protocol is published with a range."""
        return None

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """As ``Task``'s: COCO's AP, percent; NaN where no box is of that size."""
        assert self.val_loader is not None
        data, train = self.config.data, self.config.train
        return evaluate(
            network,
            self.val_loader,
            precision=train.precision,
            channels_last=train.channels_last,
            mean=data.mean,
            std=data.std,
        )
