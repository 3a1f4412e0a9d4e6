"""Samples to batches, dealt to processes.

The sampler yields what names a sample's randomness, (epoch, index), so a sample's pixels depend on nothing else: not on
the number of workers or processes, nor on where a run was resumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lip_resnet import distributed, seeding
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data.sources import Synthetic
from lip_resnet.data.transforms import eval_transform, train_transform


@dataclass(frozen=True)
class Batch:
    """One optimizer step's share of this process."""

    parts: list[tuple[Tensor, Tensor]]
    """(images (b, 3, H, W) uint8, labels (b,) int64), one pair for each accumulated part."""
    size: int
    """Images of the step over all processes."""


class _Augmented(Dataset):
    """(epoch, index) -> (image, label), the augmentation drawn from (seed, epoch, index)."""

    def __init__(self, source: Dataset, transform: v2.Transform | None, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.source[index]
        if self.transform is not None:
            seeding.reseed(seeding.derive(self.seed, epoch, index))
            image = self.transform(image)
        return image, label


class _Plain(Dataset):
    """index -> (image, label)."""

    def __init__(self, source: Dataset, transform: v2.Transform | None) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return (image if self.transform is None else self.transform(image)), label


class _TrainSampler:
    """This process's parts of every global batch of an epoch, from a given step on.

    The order of an epoch is a permutation drawn from (seed, epoch); global batch b is its b-th piece, cut into
    processes x accumulate consecutive parts. So a global batch holds the same samples on any number of processes.
    """

    def __init__(self, samples: int, batch_size: int, parts: int, drop_last: bool, seed: int) -> None:
        self.samples, self.batch_size, self.parts, self.seed = samples, batch_size, parts, seed
        self.steps = samples // batch_size if drop_last else -(-samples // batch_size)
        self.epoch = self.first_step = 0

    def size(self, step: int) -> int:
        """Images of a step over all processes."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seeding.derive(self.seed, self.epoch))
        order = torch.randperm(self.samples, generator=generator).tolist()
        rank, world = distributed.rank(), distributed.world_size()
        mine = range(rank * self.parts, (rank + 1) * self.parts)
        for step in range(self.first_step, self.steps):
            size, start = self.size(step), step * self.batch_size
            cuts = [start + size * part // (world * self.parts) for part in range(world * self.parts + 1)]
            for part in mine:
                yield [(self.epoch, index) for index in order[cuts[part] : cuts[part + 1]]]


def _data_loader(dataset: Dataset, batches: Any, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _unwrap_worker_errors(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """A worker's InputError arrives with its traceback as text; give back the one line that it was."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].rsplit("InputError: ", 1)[-1]) from None


class TrainLoader:
    """Optimizer steps of an epoch, as this process sees them.

    Raises:
        InputError: the batch does not divide, or the last one would leave a part with fewer than 2 images.
    """

    def __init__(self, source: Any, config: DataConfig, accumulate: int, seed: int) -> None:
        world, batch_size, samples = distributed.world_size(), config.batch_size, len(source)
        parts = world * accumulate
        if batch_size % parts:
            raise InputError(
                f"data.batch_size {batch_size} does not divide by {world} processes x optim.accumulate {accumulate}"
            )
        left = samples % batch_size
        if config.last_batch == "drop" and samples < batch_size:
            raise InputError(f"data.batch_size {batch_size} is larger than the {samples} training images")
        if config.last_batch == "keep" and 0 < left < 2 * parts:
            raise InputError(
                f"the last batch has {left} images for {parts} parts (processes x accumulate), and batch "
                "statistics need 2 in each; set data.last_batch: drop or another data.batch_size"
            )
        self.accumulate = accumulate
        self.sampler = _TrainSampler(samples, batch_size, accumulate, config.last_batch == "drop", seed)
        transform = None if isinstance(source, Synthetic) else train_transform(config)
        self.loader = _data_loader(_Augmented(source, transform, seed), self.sampler, config.workers)

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return self.sampler.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The steps of an epoch from ``first_step`` on."""
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        parts = _unwrap_worker_errors(self.loader)
        for step in range(first_step, len(self)):
            yield Batch([next(parts) for _ in range(self.accumulate)], self.sampler.size(step))
        next(parts, None)  # runs the loader to its end, which keeps its workers for the next epoch


class EvalLoader:
    """Every image of a set once, over all processes: batches are cut from the set's order and dealt whole to ranks."""

    def __init__(self, source: Any, config: DataConfig) -> None:
        self.samples = len(source)
        starts = range(0, self.samples, config.eval_batch_size)
        batches = [range(start, min(start + config.eval_batch_size, self.samples)) for start in starts]
        transform = None if isinstance(source, Synthetic) else eval_transform(config)
        mine = batches[distributed.rank() :: distributed.world_size()]
        self.loader = _data_loader(_Plain(source, transform), mine, config.workers)

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return _unwrap_worker_errors(self.loader)
