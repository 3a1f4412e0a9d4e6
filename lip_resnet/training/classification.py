"""Classification as a task: batches to images and targets, logits to a loss, and the evaluation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from lip_resnet import distributed, seeding
from lip_resnet.config import Config, TrainConfig
from lip_resnet.data import EvalLoader, normalize, to_device
from lip_resnet.evaluation.baselines import judge, row_of
from lip_resnet.evaluation.evaluate import autocast, evaluate
from lip_resnet.evaluation.metrics import AccuracyCounts


class Classification:
    """Classification of images; see ``Task``. The targets of a part are its labels (b,) int64.

    Args:
        device: of the network.
        val_loader: the validation set, for ``evaluate``.
    """

    logged = metrics = ("loss", "top1", "top5")
    best = "top1"
    least_images = 2

    def __init__(self, config: Config, device: torch.device, val_loader: EvalLoader | None = None) -> None:
        self.config, self.val_loader = config, val_loader
        self.train, self.classes, self.device = config.train, config.model.num_classes, device
        self.freeze_epochs = config.train.freeze_epochs
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.data.mean, config.data.std))
        self.mixing = _build_mixing(config.train)
        self.dense = self.mixing is not None or config.train.loss == "binary_cross_entropy"

    def new_counts(self, device: torch.device) -> AccuracyCounts:
        """As ``Task``'s."""
        return AccuracyCounts(device)

    def forward(
        self, network: nn.Module, images: Tensor, targets: Tensor, step: int, part: int
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """As ``Task``'s; counts are made of logits (b, classes) float32, labels and the mean loss."""
        images, labels, targets = self.prepare(images, targets, step, part)
        with autocast(images.device, self.train.precision):
            logits = network(images)
        logits = logits.float()
        loss = self.loss(logits, targets)
        return loss, (logits.detach(), labels, loss.detach())

    def prepare(self, images: Tensor, labels: Tensor, step: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) uint8 and labels (B,) -> images float32, labels, targets (B,) or (B, classes).

        Leaves the generators as the forward of this part must find them. ``step`` counts from 0.
        """
        train = self.train
        images = normalize(to_device(images, self.device, train.channels_last), self.mean, self.std)
        labels = to_device(labels, self.device)
        targets = _dense(labels, self.classes, train.label_smoothing) if self.dense else labels
        if self.mixing is not None:
            seeding.reseed(seeding.derive("mix", train.seed, step))  # one draw for the whole global batch
            images, targets = self.mixing(images, targets)
        if train.target_threshold is not None:
            targets = (targets > train.target_threshold).float()
        seeding.reseed_device(self.device, seeding.derive("device", train.seed, step, distributed.rank(), part))
        return images, labels, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, classes) float32 and targets -> the mean loss ()."""
        if self.train.loss == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=0.0 if self.dense else self.train.label_smoothing)

    def blank(self, images: int, largest: bool) -> tuple[Tensor, Tensor]:
        """As ``Task``'s."""
        side = self.config.data.sizes[-1 if largest else 0]
        return torch.zeros(images, 3, side, side, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64)

    def remark(self, best: float) -> str | None:
        """As ``Task``'s: where the top-1 of a baseline lies in its published range."""
        assert self.val_loader is not None
        return judge(row_of(self.config, len(self.val_loader.source), best))

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """As ``Task``'s: loss, top-1 and top-5, percent."""
        assert self.val_loader is not None
        data, train = self.config.data, self.train
        return evaluate(
            network,
            self.val_loader,
            precision=train.precision,
            channels_last=train.channels_last,
            mean=data.mean,
            std=data.std,
        )


def _build_mixing(config: TrainConfig) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """mixup and cutmix on the device: torchvision's, which pair every image with its neighbour in the batch."""
    choices = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(choices) if choices else None


def _dense(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (B,) -> target probabilities (B, classes) float32 with label smoothing."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
