"""Optimizer steps out of the packets of worker processes, for every task."""

import multiprocessing
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.data.decode import one_line
from lip_resnet.data.workers import BufferPool, DeferredBatchSampler, InFlightSamples, start_loader


@dataclass(frozen=True)
class Batch:
    """One optimizer step's share of this process."""

    parts: list[tuple[Tensor, Any]]
    """(images (b, 3, H, W) uint8, channels-last; labels (b,) int64), one pair for each accumulated part. Other tasks
    have other targets than labels: tensors in nested lists and dicts."""
    size: int
    """Images of the step over all processes, including skipped ones."""
    skipped: int
    """Images of this share that ``data.on_error: skip`` has left out."""


class StepLoader(ABC):
    """This process's share of every optimizer step of an epoch, out of packets that worker processes make.

    A packet is one part of the share; its ``skipped`` are the lines of the images that did not decode. The workers
    start at once.

    Args:
        source: the training images.
        sampler: see ``DeferredBatchSampler``; its epoch and first step are set before it is read.
        dataset: makes a packet, or the line of an error, of what the sampler yields.
        accumulate: parts of a process's share: ``optim.accumulate``.
    """

    def __init__(
        self,
        source: Any,
        sampler: Any,
        dataset: Dataset,
        in_flight: InFlightSamples,
        accumulate: int,
        workers: int,
        pool: BufferPool | None = None,
    ) -> None:
        self.source, self.sampler, self.accumulate, self.in_flight = source, sampler, accumulate, in_flight
        self.skipped: dict[str, int] = {}
        self.skipped_to: Path | None = None
        self.loader = start_loader(dataset, DeferredBatchSampler(sampler, pool), workers, pin=False)

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return self.sampler.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The steps of an epoch, counted from 0, from ``first_step`` on.

        Raises:
            InputError: an image does not decode (``data.on_error: stop``), too few of a part do (``skip``), or a worker
                died.
        """
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        packets = read_packets(self.loader, self.in_flight, self.source)
        for step in range(first_step, len(self)):
            parts = [next(packets) for _ in range(self.accumulate)]
            for packet in parts:
                for line in packet.skipped:
                    self._skip(line)
            skipped = sum(len(packet.skipped) for packet in parts)
            yield Batch([self.unpack(packet) for packet in parts], self.sampler.size(step), skipped)
        next(packets, None)  # runs the loader to its end, which keeps its workers for the next epoch

    @abstractmethod
    def unpack(self, packet: Any) -> tuple[Tensor, Any]:
        """A packet -> images (b, 3, H, W) uint8 and targets."""

    def _skip(self, line: str) -> None:
        line = one_line(line)
        self.skipped[line] = self.skipped.get(line, 0) + 1
        if self.skipped[line] == 1:
            tqdm.write(f"skipped: {line}", file=sys.stderr)
            if self.skipped_to is not None:
                try:
                    with open(self.skipped_to, "a", encoding="utf-8", errors="backslashreplace") as file:
                        file.write(line + "\n")
                except OSError as error:
                    tqdm.write(f"warning: {self.skipped_to}: cannot write: {error.strerror}", file=sys.stderr)


def check_batch_size(config: Any, samples: int, accumulate: int, least: int) -> None:
    """Check that every part of a batch has images.

    Args:
        config: with ``batch_size`` and ``last_batch``.
        samples: training images.
        least: images that a part must have.

    Raises:
        InputError: ``data.batch_size`` does not divide by processes x accumulate, there are fewer images, or a part of
            the last batch would have fewer than ``least``.
    """
    world, batch_size = distributed.world_size(), config.batch_size
    parts, remainder = world * accumulate, samples % batch_size
    if batch_size % parts:
        raise InputError(
            f"data.batch_size {batch_size} does not divide by {world} processes x optim.accumulate {accumulate}"
        )
    if config.last_batch == "drop" and samples < batch_size:
        raise InputError(f"data.batch_size {batch_size} is larger than the {samples} training images")
    if config.last_batch == "keep" and 0 < remainder < least * parts:
        raise InputError(
            f"the last batch has {remainder} images for {parts} parts (processes x accumulate), and "
            f"{'batch statistics need 2' if least == 2 else f'{least} is needed'} in each; set data.last_batch: drop "
            "or another data.batch_size"
        )


def read_packets(loader: DataLoader, in_flight: InFlightSamples, source: Any) -> Iterator[Any]:
    """The workers' packets.

    Raises:
        InputError: one is the line of an error, or a worker died.
    """
    try:
        for packet in loader:
            if isinstance(packet, str):
                raise InputError(packet)
            yield packet
    except RuntimeError as error:
        death = in_flight.explain(error, source)
        if death is None:
            raise
        for child in multiprocessing.active_children():
            # The other workers may be waiting for a lock that the dead one held.
            if child.pid in in_flight.pids():
                child.kill()
        raise death from error
