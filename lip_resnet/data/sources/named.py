"""torchvision's image classification sets that have a split, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from lip_resnet import compat, distributed
from lip_resnet.config import InputError
from lip_resnet.data.sources.base import Arrays, Files


@dataclass(frozen=True)
class _Named:
    """How torchvision opens a set, and how many images it must have."""

    build: Callable[..., Any]
    images: dict[str, int]
    """Images in our train and val; a download that was killed while it unpacked leaves fewer."""
    splits: dict[str, tuple[Any, ...]]
    """Our split -> torchvision's, which are joined."""
    split: str = "split"
    """The keyword argument for torchvision's split."""
    options: dict[str, Any] | None = None
    """Other keyword arguments."""


def _count(train: int, val: int) -> dict[str, int]:
    return {"train": train, "val": val}


def _splits(val: Any, *train: Any) -> dict[str, tuple[Any, ...]]:
    return {"train": train or ("train",), "val": (val,)}


# With `str` as the loader of a file, torchvision's sets return its path and read nothing.
_PATHS: dict[str, Any] = {"loader": str}

NAMED = {
    "cifar10": _Named(datasets.CIFAR10, _count(50_000, 10_000), _splits(False, True), "train"),
    "cifar100": _Named(datasets.CIFAR100, _count(50_000, 10_000), _splits(False, True), "train"),
    "mnist": _Named(datasets.MNIST, _count(60_000, 10_000), _splits(False, True), "train"),
    "fashion_mnist": _Named(datasets.FashionMNIST, _count(60_000, 10_000), _splits(False, True), "train"),
    "kmnist": _Named(datasets.KMNIST, _count(60_000, 10_000), _splits(False, True), "train"),
    "svhn": _Named(datasets.SVHN, _count(73_257, 26_032), _splits("test")),
    "stl10": _Named(datasets.STL10, _count(5_000, 8_000), _splits("test")),
    "gtsrb": _Named(datasets.GTSRB, _count(26_640, 12_630), _splits("test")),
    "imagenette": _Named(datasets.Imagenette, _count(9_469, 3_925), _splits("val"), options=_PATHS),
    "flowers102": _Named(datasets.Flowers102, _count(2_040, 6_149), _splits("test", "train", "val"), options=_PATHS),
    "food101": _Named(datasets.Food101, _count(75_750, 25_250), _splits("test"), options=_PATHS),
    "pets": _Named(datasets.OxfordIIITPet, _count(3_680, 3_669), _splits("test", "trainval")),
    "dtd": _Named(datasets.DTD, _count(3_760, 1_880), _splits("test", "train", "val"), options=_PATHS),
    "aircraft": _Named(datasets.FGVCAircraft, _count(6_667, 3_333), _splits("test", "trainval"), options=_PATHS),
    "country211": _Named(
        datasets.Country211, _count(42_200, 21_100), _splits("test", "train", "valid"), options=_PATHS
    ),
}
"""A recipe's ``data.name`` -> the set."""


def named_sources(name: str, data_root: str, download: bool, splits: tuple[str, ...]) -> list[Arrays | Files]:
    """The splits of a named set.

    Args:
        name: one of ``NAMED``.
        data_root: ``data.root``.
        download: whether rank 0 downloads what is missing first.

    Raises:
        InputError: the set is missing or incomplete, cannot be downloaded, or needs scipy, which is not installed.
    """
    root = Path(data_root).expanduser()

    def download_splits() -> None:
        for split in splits:
            _open(name, root, split, download=True)

    if download:
        distributed.on_main(download_splits)
    return [_source(name, root, split) for split in splits]


def _open(name: str, root: Path, split: str, download: bool) -> list[Any]:
    """torchvision's datasets that make up one of our splits."""
    named = NAMED[name]
    options = {"root": str(root), "download": download, **(named.options or {})}
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        return [named.build(**options, **{named.split: theirs}) for theirs in named.splits[split]]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if download:
            raise InputError(f"data.download: cannot download {name} to {root}: {reason}") from error
        raise InputError(
            f"data.root: {root} does not hold {name}'s {split}; data.download: true fetches it ({reason})"
        ) from error
    except ImportError as error:  # torchvision imports scipy for the sets whose labels are MATLAB files
        raise InputError(f'data.name: {name} needs scipy: pip install "lip-resnet[data]" ({error})') from error


def _source(name: str, root: Path, split: str) -> Arrays | Files:
    parts = _open(name, root, split, download=False)
    source: Arrays | Files
    if hasattr(parts[0], "data"):
        source = _arrays(f"{name}/{split}", parts[0])
    else:
        samples = [sample for part in parts for sample in _samples(part)]
        source = Files(root, _classes(parts[0], [label for _, label in samples]), samples)
    expected = NAMED[name].images[split]
    if len(source) != expected:
        raise InputError(
            f"data.root: {root} holds {len(source)} images of {name}'s {split}, the whole set {expected}: remove it "
            "and download it again"
        )
    return source


def _arrays(name: str, part: Any) -> Arrays:
    pixels = np.asarray(part.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:  # channels first
        pixels = pixels.transpose(0, 2, 3, 1)
    targets = [int(label) for label in (part.targets if hasattr(part, "targets") else part.labels)]
    return Arrays(name, pixels, targets, _classes(part, targets))


def _classes(part: Any, labels: list[int]) -> list[str]:
    """The classes' names (the first of several, in Imagenette), or their numbers where torchvision has no names."""
    names = getattr(part, "classes", range(1 + max(labels)))
    return [name[0] if isinstance(name, tuple) else str(name) for name in names]


def _samples(part: Any) -> list[tuple[str, int]]:
    """Every (path, label) of a set of files."""
    files = compat.torchvision_files(part)  # None for the sets that were opened with _PATHS
    if files is None:
        files = [part[index] for index in range(len(part))]
    return [(str(path), label) for path, label in files]
