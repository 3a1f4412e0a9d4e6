"""Images with boxes to padded batches, divided among processes; the pixels are a function of (seed, epoch, index)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lip_resnet import distributed, seeding
from lip_resnet.config import DetectionDataConfig, InputError
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.data.decode import BadImage, image_errors
from lip_resnet.data.steps import StepLoader, check_batch_size, read_packets
from lip_resnet.data.workers import DeferredBatchSampler, InFlightSamples, start_loader
from lip_resnet.detection.canvas import aspect_groups, canvas, eval_batches, resize, resized
from lip_resnet.detection.samples import DetectionSource


class _Packet(NamedTuple):
    """A part of a batch, or a batch of an evaluation, as a worker sends it."""

    images: Tensor
    """(b, H, W, 3) uint8, zero outside the valid areas."""
    sizes: list[tuple[int, int]]
    """Height and width of every image's valid area, from the upper left corner."""
    boxes: list[np.ndarray]
    """(n, 4) float32 of every image: x1, y1, x2, y2, pixels of the resized image."""
    labels: list[np.ndarray]
    """(n,) int64 of every image, from 1."""
    skipped: tuple[str, ...]
    """A line for each image left out."""


class _Batches(Dataset):
    """A request, (None, [(epoch, index), ...]), to a packet or the line of an error."""

    def __init__(
        self,
        source: DetectionSource,
        config: EvalDetectionDataConfig,
        in_flight: InFlightSamples,
        seed: int | None = None,
    ) -> None:
        self.source, self.config, self.in_flight, self.seed = source, config, in_flight, seed

    def __getitems__(self, request: tuple[None, list[tuple[int, int]]]) -> _Packet | str:
        pixels: list[np.ndarray] = []
        boxes: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        skipped: list[str] = []
        for epoch, index in request[1]:
            self.in_flight.begin(index)
            try:
                with image_errors(self.source.path(index), "load"):
                    image, (image_boxes, image_labels) = self._load(epoch, index)
            except InputError as error:
                if self._stops or not isinstance(error, BadImage):
                    return str(error)
                skipped.append(str(error))
                continue
            pixels.append(image)
            boxes.append(image_boxes)
            labels.append(image_labels + 1)
        self.in_flight.end()
        sizes = [image.shape[:2] for image in pixels]
        sides = canvas(*np.max(sizes, axis=0).tolist()) if sizes else (0, 0)
        images = torch.zeros((len(pixels), *sides, 3), dtype=torch.uint8)
        for padded, image in zip(images.numpy(), pixels, strict=True):
            padded[: image.shape[0], : image.shape[1]] = image
        return _Packet(images, sizes, boxes, labels, tuple(skipped))

    @property
    def _stops(self) -> bool:
        return not isinstance(self.config, DetectionDataConfig) or self.seed is None or self.config.on_error == "stop"

    def _load(self, epoch: int, index: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """An image, resized and in training perhaps flipped, (h, w, 3) uint8; in training its boxes and labels."""
        image = self.source[index]
        height, width = image.height, image.width
        h, w = resized(height, width, self.config.size, self.config.max_size)
        if self.seed is None:
            return resize(image, h, w), (np.empty((0, 4), np.float32), np.empty(0, np.int64))
        assert isinstance(self.config, DetectionDataConfig)
        seeding.reseed(seeding.derive("augment", self.seed, epoch, index, 0))
        flip = bool(torch.rand(1) < self.config.flip)
        boxes, labels = self.source.annotations(index)
        boxes = boxes * np.array([w / width, h / height] * 2, dtype=np.float32)
        if flip:
            boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
        return resize(image, h, w, flip), (boxes, labels)


class _GroupedSampler:
    """This process's parts of every global batch of an epoch, from a given step on.

    A global batch holds images of one aspect group. Their order is drawn from (seed, epoch), and so is the order of the
    batches; what remains of all groups makes the last batches. So a global batch holds the same images on any number of
    processes, and an epoch every image once.
    """

    def __init__(self, groups: np.ndarray, config: DetectionDataConfig, parts: int, seed: int) -> None:
        self.groups, self.batch_size, self.parts, self.seed = groups, config.batch_size, parts, seed
        self.samples = len(groups)
        self.steps = (
            self.samples // self.batch_size if config.last_batch == "drop" else -(-self.samples // self.batch_size)
        )
        self.epoch = self.first_step = 0

    def size(self, step: int) -> int:
        """Images of a step over all processes."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def batches(self, epoch: int) -> list[list[int]]:
        """Every global batch of an epoch, a smaller one last."""
        generator = torch.Generator().manual_seed(seeding.derive("order", self.seed, epoch))
        order = torch.randperm(self.samples, generator=generator).numpy()
        whole: list[list[int]] = []
        rest: list[int] = []
        for group in np.unique(self.groups):
            members = order[self.groups[order] == group].tolist()
            end = len(members) // self.batch_size * self.batch_size
            whole += [members[start : start + self.batch_size] for start in range(0, end, self.batch_size)]
            rest += members[end:]
        end = len(rest) // self.batch_size * self.batch_size
        whole += [rest[start : start + self.batch_size] for start in range(0, end, self.batch_size)]
        shuffled = [whole[index] for index in torch.randperm(len(whole), generator=generator).tolist()]
        return shuffled + ([rest[end:]] if rest[end:] else [])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.batches(self.epoch)
        rank, world = distributed.rank(), distributed.world_size()
        for step in range(self.first_step, self.steps):
            keys = [(self.epoch, index) for index in batches[step]]
            for part in range(rank * self.parts, (rank + 1) * self.parts):
                cut, end = (len(keys) * edge // (world * self.parts) for edge in (part, part + 1))
                yield keys[cut:end]


class DetectionTrainLoader(StepLoader):
    """Images and boxes of every step.

    A part is (images (b, 3, H, W) uint8 in channels-last order, zero outside the valid areas; targets). Targets are
    ``sizes``, [(h, w)] of the valid areas; ``boxes``, [(n, 4) float32] in pixels of the resized images; and ``labels``,
    [(n,) int64] from 1.

    Args:
        source: the training images.
        accumulate: parts of a process's share: ``optim.accumulate``.
        seed: of orders and flips: ``train.seed``.

    Raises:
        InputError: as ``check_batch_size``.
    """

    def __init__(self, source: DetectionSource, config: DetectionDataConfig, accumulate: int, seed: int) -> None:
        check_batch_size(config, len(source), accumulate, least=1)
        in_flight = InFlightSamples(config.workers)
        dataset = _Batches(source, config, in_flight, seed)
        sampler = _GroupedSampler(aspect_groups(source.sizes, config.aspect_groups), config, accumulate, seed)
        super().__init__(source, sampler, dataset, in_flight, accumulate, config.workers)

    def unpack(self, packet: _Packet) -> tuple[Tensor, dict[str, Any]]:
        """A packet -> images and targets."""
        if not packet.sizes:
            raise InputError(f"data.on_error: of one part of a batch, all {len(packet.skipped)} images do not decode")
        boxes, labels = (list(map(torch.from_numpy, arrays)) for arrays in (packet.boxes, packet.labels))
        return packet.images.permute(0, 3, 1, 2), {"sizes": packet.sizes, "boxes": boxes, "labels": labels}


class DetectionEvalLoader:
    """Every image of a set once, over all processes, in batches of one canvas; each batch is read by one process.

    Iterating yields (images (b, 3, H, W) uint8, zero outside the valid areas; sizes [(h, w)] of these), for each of
    ``batches``, the image indices of this process's batches. They are the same for any number of processes.

    Raises, while it is read:
        InputError: an image does not decode (``data.on_error`` is for training alone), or a worker died.
    """

    def __init__(self, source: DetectionSource, config: EvalDetectionDataConfig) -> None:
        self.source = source
        batches = eval_batches(source.sizes, config.size, config.max_size, config.eval_batch_size)
        self.batches = batches[distributed.rank() :: distributed.world_size()]
        self.in_flight = InFlightSamples(config.workers)
        requests = [[(0, index) for index in batch] for batch in self.batches]
        dataset, sampler = _Batches(source, config, self.in_flight), DeferredBatchSampler(requests)
        self.loader = start_loader(dataset, sampler, config.workers, pin=distributed.device().type == "cuda")

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
        for packet in read_packets(self.loader, self.in_flight, self.source):
            yield packet.images.permute(0, 3, 1, 2), packet.sizes
