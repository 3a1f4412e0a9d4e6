"""Samples to batches, divided among processes.

The sampler yields (epoch, index, repeat), from which a sample's augmentation is derived. So its pixels depend on
nothing else: not on the number of workers or processes, nor on where a run was resumed.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lip_resnet import distributed, seeding
from lip_resnet.config import DataConfig, EvalDataConfig, InputError
from lip_resnet.data.decode import BadImage, image_errors
from lip_resnet.data.gpu_decode import BatchDecoder, Packer, Parcel, on_this_gpu
from lip_resnet.data.sources.base import Encoded, Label, Samples, name_sample, prefetch_samples
from lip_resnet.data.steps import StepLoader, check_batch_size, read_packets
from lip_resnet.data.transforms import TrainTransform, eval_transform
from lip_resnet.data.workers import PREFETCH_FACTOR, BufferPool, DeferredBatchSampler, InFlightSamples, start_loader


class _Packet(NamedTuple):
    """A batch as a worker sends it."""

    images: Tensor | Parcel | int
    """(b, H, W, 3) uint8; or the number of the shared buffer that holds them; or a parcel, for ``decode: gpu``."""
    labels: np.ndarray
    """(b,) int64."""
    side: int
    """H and W."""
    skipped: tuple[str, ...]
    """A line for each image left out."""


class _TrainBatches(Dataset):
    """A request, (number of a shared buffer or None, [(epoch, index, repeat), ...]), to a packet or an error's line.

    A sample's augmentation is drawn from (seed, epoch, index, repeat) alone.
    """

    def __init__(
        self, source: Samples, config: DataConfig, seed: int, memory: Tensor | None, in_flight: InFlightSamples
    ) -> None:
        self.source, self.config, self.seed, self.memory, self.in_flight = source, config, seed, memory, in_flight
        self.transform = TrainTransform(config)

    def __getitems__(self, request: tuple[int | None, list[tuple[int, int, int]]]) -> _Packet | str:
        slot, keys = request
        side = self.config.size_at(keys[0][0])
        shape = (len(keys), side, side, 3)
        packer = Packer(side) if self.config.decode == "gpu" else None
        if slot is None or self.memory is None:
            images = torch.empty(shape, dtype=torch.uint8)
        else:
            images = self.memory[slot, : math.prod(shape)].view(shape)
        labels: list[Label] = []
        skipped: list[str] = []
        prefetch_samples(self.source, [index for _, index, _ in keys])
        for epoch, index, repeat in keys:
            self.in_flight.begin(index)
            seed = seeding.derive("augment", self.seed, epoch, index, repeat)
            try:
                with image_errors(name_sample(self.source, index), "load"):
                    labels.append(self._load(index, seed, images[len(labels)], packer))
            except InputError as error:  # only bad images are skipped, not the failure of a server
                if self.config.on_error == "stop" or not isinstance(error, BadImage):
                    return str(error)
                skipped.append(str(error))
        self.in_flight.end()
        sent: Tensor | Parcel | int = images[: len(labels)] if slot is None else slot
        if packer is not None:
            sent = packer.seal()
        return _Packet(sent, np.array(labels, dtype=np.int64), side, tuple(skipped))

    def _load(self, index: int, seed: int, out: Tensor, packer: Packer | None) -> Label:
        source = self.source
        if isinstance(source, Encoded):
            data, label = source.read(index), source.label(index)
            if packer is not None and self._leave_encoded(source, index, data, seed, packer):
                return label
            if self.transform.data(data, source.path(index), seed, out):
                source.check(index, data)
        else:
            image, label = source[index]
            if isinstance(image, Tensor):
                out.copy_(image[:, : len(out), : len(out)].permute(1, 2, 0))
            else:
                self.transform.image(image, seed, out)
        if packer is not None:
            packer.add_pixels(out)
        return label

    def _leave_encoded(self, source: Encoded, index: int, data: bytes, seed: int, packer: Packer) -> bool:
        """Pack an encoded JPEG if it is for the GPU. It is checked: nvJPEG decodes damaged scans without an error."""
        drawn = self.transform.draw(data, seed)
        if drawn is None or not packer.takes(data, drawn[0]) or not source.check(index, data):
            return False
        packer.add_file(data, source.path(index), *drawn)
        return True


class _EvalBatches(Dataset):
    """A request, (None, range of indices), to (images, labels) or an error's line. PIL decodes every image."""

    def __init__(self, source: Samples, config: EvalDataConfig, in_flight: InFlightSamples) -> None:
        self.source, self.in_flight, self.transform = source, in_flight, eval_transform(config)

    def __getitems__(self, request: tuple[None, range]) -> tuple[Tensor, Tensor] | str:
        images: list[Tensor] = []
        labels: list[Label] = []
        _, indices = request
        prefetch_samples(self.source, indices)
        for index in indices:
            self.in_flight.begin(index)
            try:
                with image_errors(name_sample(self.source, index), "load"):
                    image, label = self.source[index]
                    images.append(image if isinstance(image, Tensor) else self.transform(image))
            except InputError as error:
                return str(error)
            labels.append(label)
        self.in_flight.end()
        return torch.stack(images), torch.tensor(labels)


class _TrainSampler:
    """This process's parts of every global batch of an epoch, from a given step on.

    The order of an epoch is a permutation drawn from (seed, epoch); global batch b is its b-th section, divided into
    processes x accumulate consecutive parts. So a global batch holds the same samples on any number of processes.

    With repeats, a batch is the permutation's next batch_size / repeats samples, the whole list ``repeats`` times: the
    repeats of a sample are in different parts if there are as many parts. An epoch has as many steps as without.
    """

    def __init__(self, samples: int, config: DataConfig, parts: int, seed: int) -> None:
        self.samples, self.batch_size, self.repeats = samples, config.batch_size, config.repeats
        self.parts, self.seed = parts, seed
        self.steps = samples // self.batch_size if config.last_batch == "drop" else -(-samples // self.batch_size)
        self.epoch = self.first_step = 0

    def size(self, step: int) -> int:
        """Images of a step over all processes."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        generator = torch.Generator().manual_seed(seeding.derive("order", self.seed, self.epoch))
        order = torch.randperm(self.samples, generator=generator)
        rank, world = distributed.rank(), distributed.world_size()
        for step in range(self.first_step, self.steps):
            size, start = self.size(step), step * (self.batch_size // self.repeats)
            chosen = order[start : start - (-size // self.repeats)].tolist()
            keys = [(self.epoch, index, repeat) for repeat in range(self.repeats) for index in chosen][:size]
            for part in range(rank * self.parts, (rank + 1) * self.parts):
                cut, end = (size * edge // (world * self.parts) for edge in (part, part + 1))
                yield keys[cut:end]


class TrainLoader(StepLoader):
    """Images and labels of every step.

    Args:
        source: the training images.
        accumulate: parts of a process's share, each a batch of its own: ``optim.accumulate``.
        seed: of orders and augmentations: ``train.seed``.
        decoder: for ``decode: gpu``; None for this process's GPU.

    Raises:
        InputError: as ``check_batch_size``; or ``decode: gpu`` has no GPU or library.
    """

    def __init__(
        self, source: Samples, config: DataConfig, accumulate: int, seed: int, decoder: BatchDecoder | None = None
    ) -> None:
        check_batch_size(config, len(source), accumulate, least=2)
        self.config = config
        if config.decode == "gpu" and decoder is None:
            decoder = on_this_gpu(config.interpolation)
        self.decoder = decoder
        in_flight = InFlightSamples(config.workers)
        self.pool = None
        if config.workers and config.decode != "gpu":
            # As many as the workers can fill in advance, and as the caller can hold while it waits for the next.
            buffers = PREFETCH_FACTOR * config.workers + 2 * accumulate + 1
            images = -(-config.batch_size // (distributed.world_size() * accumulate))
            self.pool = BufferPool(buffers, images * config.sizes[-1] ** 2 * 3)
        memory = None if self.pool is None else self.pool.memory
        dataset = _TrainBatches(source, config, seed, memory, in_flight)
        sampler = _TrainSampler(len(source), config, accumulate, seed)
        super().__init__(source, sampler, dataset, in_flight, accumulate, config.workers, self.pool)

    def unpack(self, packet: _Packet) -> tuple[Tensor, Tensor]:
        """A packet -> images (b, 3, side, side) uint8 in channels-last order, and labels (b,) int64."""
        decoded = len(packet.labels)
        if packet.skipped and decoded < 2:
            raise InputError(
                f"data.on_error: of one part of a batch, {decoded} images decode and {len(packet.skipped)} do not"
            )
        images, labels = packet.images, torch.from_numpy(packet.labels)
        if isinstance(images, Parcel):
            assert self.decoder is not None
            return self.decoder(images), labels
        if isinstance(images, int):
            assert self.pool is not None
            images = self.pool.lend(images, (decoded, packet.side, packet.side, 3))
        return images.permute(0, 3, 1, 2), labels


class EvalLoader:
    """Every image of a set once, over all processes: batches in the set's order, each read by one process.

    Iterating yields (images (b, 3, H, W) uint8, labels (b,) int64, or (b, K) of a set with several right classes).

    Raises, while it is read:
        InputError: an image does not decode (``data.on_error`` is for training alone), or a worker died.
    """

    def __init__(self, source: Samples, config: EvalDataConfig) -> None:
        self.source, self.batch_size = source, config.eval_batch_size
        self.batches: list[range] = []
        self.choose(range(len(source)))
        self.in_flight = InFlightSamples(config.workers)
        dataset = _EvalBatches(source, config, self.in_flight)
        sampler = DeferredBatchSampler(self.batches)
        self.loader = start_loader(dataset, sampler, config.workers, pin=distributed.device().type == "cuda")

    def choose(self, images: range) -> None:
        """From now on, read only these images of the source."""
        self.samples = len(images)
        starts = range(0, self.samples, self.batch_size)[distributed.rank() :: distributed.world_size()]
        self.batches[:] = [images[start : start + self.batch_size] for start in starts]

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for packet in read_packets(self.loader, self.in_flight, self.source):
            images, labels = packet
            yield images, labels
