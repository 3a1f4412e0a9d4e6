"""Files to batches of uint8 images: the same code for ImageNet folders, the embedded digits and synthetic noise.

A *source* is a torchvision-style dataset: ``source[i]`` is (PIL image, label), ``source.classes`` the class names.
The sampler yields what names a sample's randomness, (epoch, index), so a sample's pixels depend on nothing
else: not on the number of workers or processes, nor on where a run was resumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from lip_resnet import distributed, seeding
from lip_resnet.config import DataConfig, InputError


@dataclass(frozen=True)
class Batch:
    """One optimizer step's share of this process."""

    parts: list[tuple[Tensor, Tensor]]
    """(images (b, 3, H, W) uint8, labels (b,) int64), one pair for each accumulated part."""
    size: int
    """Images of the step over all processes."""


# Sources


def _read_rgb(path: str) -> Image.Image:
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot decode this image: {error}") from None


class Digits(Dataset):
    """scikit-learn's 1,797 real handwritten digits as RGB images of 8x8; every fifth of a class validates."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits  # a second of imports that only this source needs

        digits = load_digits()
        rank_in_class = np.empty(len(digits.target), dtype=int)
        for label in range(10):
            members = digits.target == label
            rank_in_class[members] = np.arange(members.sum())
        chosen = (rank_in_class % 5 != 4) if train else (rank_in_class % 5 == 4)
        self.pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.targets[index]


class Synthetic(Dataset):
    """Noise that costs nothing to load: (3, size, size) uint8 tensors, so that train.py's own speed can be measured."""

    def __init__(self, images: int, num_classes: int, size: int) -> None:
        self.images = images
        self.classes = tuple(str(label) for label in range(num_classes))
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (min(images, 64), 3, size, size), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index % len(self.pixels)], index % len(self.classes)


def _class_folders(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise InputError(f"data.root: cannot read {root}: {error.strerror}") from None


def _read_selection(path: str, found: list[str]) -> tuple[list[str], set[str] | None]:
    """A data.classes file -> the classes to keep, and the names of the training images to keep (None: all)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"data.classes: cannot read {path}: {reason}") from None
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    images = {line for line in lines if line.lower().endswith(IMG_EXTENSIONS)}
    # An image's class is its folder, or in ImageNet's own naming what stands before the underscore.
    classes = {line.split("/")[0] if "/" in line else line.rsplit("_", 1)[0] for line in images}
    classes |= {line for line in lines if line not in images}
    if not classes:
        raise InputError(f"data.classes: {path} names no class")
    unknown = sorted(classes - set(found))
    if unknown:
        raise InputError(f"data.classes: {path}: {len(unknown)} names have no folder, the first is {unknown[0]!r}")
    return sorted(classes), {image.split("/")[-1] for image in images} or None


class _Folder(ImageFolder):
    """torchvision's ImageFolder, restricted to some classes; an image that does not decode stops with its path."""

    def __init__(self, root: Path, classes: list[str]) -> None:
        self._classes = classes
        try:
            super().__init__(str(root), loader=_read_rgb)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"data.root: {error}") from None

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self._classes, {name: label for label, name in enumerate(self._classes)}


def _folder_sources(config: DataConfig, splits: tuple[str, ...]) -> list[_Folder]:
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root: {root} is not a directory; it must hold train/ and val/")
    for split in splits:
        if not (root / split).is_dir():
            raise InputError(f"data.root: {root} has no {split}/; it must hold {' and '.join(s + '/' for s in splits)}")
    found = {split: _class_folders(root / split) for split in splits}
    classes = found[splits[0]]
    if not classes:
        raise InputError(f"data.root: {root / splits[0]} holds no class folders")
    images = None
    if config.classes:
        classes, images = _read_selection(config.classes, classes)
    for split in splits[1:]:
        differing = sorted(set(classes) ^ (set(found[split]) & set(classes) if config.classes else set(found[split])))
        if differing:
            raise InputError(
                f"data.root: class folders of {splits[0]}/ and {split}/ differ in {len(differing)}, "
                f"the first is {differing[0]!r}"
            )
    sources = [_Folder(root / split, classes) for split in splits]
    if images is not None and splits[0] == "train":
        train = sources[0]
        train.samples = [(path, label) for path, label in train.samples if Path(path).name in images]
        train.imgs, train.targets = train.samples, [label for _, label in train.samples]
        if len(train.samples) != len(images):
            raise InputError(
                f"data.classes: {config.classes} lists {len(images)} images, {len(train.samples)} are in {root}/train"
            )
    return sources


def build_sources(config: DataConfig, num_classes: int, splits: tuple[str, ...] = ("train", "val")) -> list[Any]:
    """The datasets of the splits asked for, ("train", "val") or ("val",).

    Raises:
        InputError: the folders are not there, differ between the splits, or hold another number of classes.
    """
    if config.name == "digits":
        sources = [Digits(train=split == "train") for split in splits]
    elif config.name == "synthetic":
        shapes = {"train": (config.images, config.size), "val": (max(1, config.images // 10), config.eval_size)}
        sources = [Synthetic(shapes[split][0], num_classes, shapes[split][1]) for split in splits]
    else:
        sources = _folder_sources(config, splits)
    found = len(sources[0].classes)
    if found != num_classes:
        raise InputError(f"model.num_classes is {num_classes}, but the data has {found} classes")
    return sources


# Transforms: PIL image -> (3, H, W) uint8


def train_transform(config: DataConfig) -> v2.Transform:
    """The reference's random resized crop and flip, and what the recipe adds; on PIL images."""
    interpolation = InterpolationMode(config.interpolation)
    steps: list[Any] = [
        v2.RandomResizedCrop(config.size, config.crop_scale, config.crop_ratio, interpolation=interpolation),
        v2.RandomHorizontalFlip(config.flip),
    ]
    if config.rand_augment:
        colour = tuple(round(255 * value) for value in config.mean)
        try:
            steps.append(rand_augment_transform(config.rand_augment, {"img_mean": colour}))
        except (AssertionError, ValueError, KeyError) as error:
            raise InputError(f"data.rand_augment: {config.rand_augment!r} is not a timm RandAugment: {error}") from None
    if config.color_jitter:
        steps.append(v2.ColorJitter(*(config.color_jitter,) * 3))
    steps.append(v2.PILToTensor())
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing))
    return v2.Compose(steps)


def eval_transform(config: DataConfig) -> v2.Transform:
    """The reference's protocol: the shorter side to ``eval_resize``, then the centre crop of ``eval_size``."""
    return v2.Compose(
        [
            v2.Resize(config.eval_resize, InterpolationMode(config.interpolation)),
            v2.CenterCrop(config.eval_size),
            v2.PILToTensor(),
        ]
    )


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


# Loaders


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


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ``mean`` and ``std`` (3,) of pixels in [0, 1], on the images' device."""
    shape = (1, -1, 1, 1)
    return (images.float() - 255 * mean.view(shape)).div_(255 * std.view(shape))
