"""What a network is trained to do, as the training loop needs it: a command hands a ``Task`` to the engine."""

from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lip_resnet.data import Batch


class Counts(Protocol):
    """Sums over images on the device, without a synchronisation: those of the steps since the last log line."""

    sums: Tensor
    """(n,); a checkpoint holds them."""

    def add(self, *parts: Any) -> None:
        """Add a part of a batch: the second value of ``Task.forward``."""
        ...

    def reset(self) -> None:
        """Set all sums to zero."""
        ...

    def reduce(self) -> dict[str, float]:
        """The sums over all processes: ``images``, and means such as ``loss``. Synchronises with the device."""
        ...


class Task(Protocol):
    """Batches to a loss and its counts, and the evaluation.

    A part of a batch is (images, targets): images (b, 3, H, W) uint8, and targets, a tensor or a tree of tensors in the
    task's own form. Randomness is a function of (seed, step, rank, part).
    """

    @property
    def logged(self) -> tuple[str, ...]:
        """Keys of ``Counts.reduce`` that are logged under ``train/``; the first is the loss."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of ``evaluate`` that are logged under ``val/``."""
        ...

    @property
    def best(self) -> str:
        """The metric that selects best.pt: the higher the better."""
        ...

    @property
    def freeze_epochs(self) -> int:
        """First epochs in which only the classifier trains."""
        ...

    @property
    def least_images(self) -> int:
        """Images that a part must have: of which batch norm can compute statistics."""
        ...

    def new_counts(self, device: torch.device) -> Counts:
        """Counts of zero."""
        ...

    def forward(
        self, network: nn.Module, images: Tensor, targets: Any, step: int, part: int
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Forward of part ``part`` of step ``step`` (both from 0) -> mean loss () float32, arguments of ``Counts.add``.

        The latter are detached from the graph.
        """
        ...

    def blank(self, images: int, largest: bool) -> tuple[Tensor, Any]:
        """A part without content of so many images, of the smallest or the largest training size; on the CPU."""
        ...

    def remark(self, best: float) -> str | None:
        """A line about a finished run's value of the metric ``best``, such as what is published; or None."""
        ...

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """``metrics`` over the validation set. A collective.

        Raises:
            FloatingPointError: an output is not finite.
        """
        ...


class Loader(Protocol):
    """Optimizer steps by epoch, such as ``data.TrainLoader``."""

    skipped_to: Path | None
    """A file that gets a line for each image that did not decode; None: none."""

    @property
    def source(self) -> Sized:
        """The training images."""
        ...

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The steps of an epoch from ``first_step`` on, both counted from 0."""
        ...
