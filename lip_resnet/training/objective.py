"""What a step minimises: batches to images and targets, logits to a loss; its randomness is a function of the step."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from lip_resnet import distributed, seeding
from lip_resnet.config import Config, TrainConfig
from lip_resnet.data import normalize, to_device


class Objective:
    """Images and targets of a part of a step, and the loss of its logits: a function of (seed, step, rank, part)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.train, self.classes, self.device = config.train, config.model.num_classes, device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.data.mean, config.data.std))
        self.mixing = _build_mixing(config.train)
        self.dense = self.mixing is not None or config.train.loss == "binary_cross_entropy"

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


def _build_mixing(config: TrainConfig) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """mixup and cutmix on the device: torchvision's, which pair every image with its neighbour in the batch."""
    choices = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(choices) if choices else None


def _dense(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (B,) -> target probabilities (B, classes) float32 with label smoothing."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
