"""The sets that eval.py evaluates on: a recipe's validation set, or one of ImageNet's test sets.

Layouts, class subsets and resizing are the authors' own: hendrycks/natural-adv-examples and imagenet-r (eval.py),
hendrycks/robustness (ImageNet-C/test.py), modestyachts/ImageNetV2, HaohanWang/ImageNet-Sketch,
google-research/reassessed-imagenet (README).
"""

import importlib.resources
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor
from torch.utils.data import Dataset

from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.sources import build_sources
from lip_resnet.data.sources.base import Encoded, Files, LeftOut, name_sample, prefetch_samples, say_left_out
from lip_resnet.data.sources.folder import Folder
from lip_resnet.data.transforms import eval_transform
from lip_resnet.evaluation.classes import indices_of, name_of_set

IMAGES = {
    "imagenet": 50_000,
    "imagenet-v2": 10_000,
    "imagenet-a": 7_500,
    "imagenet-r": 30_000,
    "imagenet-sketch": 50_889,
    "imagenet-real": 46_837,
    "imagenet-c": 50_000,
}
"""Test set -> number of images; for ImageNet-C of each severity of each corruption."""

_SCORING = {
    "imagenet-a": "among the set's 200 classes",
    "imagenet-r": "among the set's 200 classes",
    "imagenet-real": "any of an image's ReaL labels; images without any left out",
    "imagenet-c": "mean over corruptions and severities",
}
SIDE_OF_C = 224
"""Side in pixels of ImageNet-C's images: centre crops, which its authors do not resize again."""


@dataclass(frozen=True)
class EvalSet:
    """Images, their labels, and how a network is scored on them."""

    name: str
    """One of ``IMAGES``, or for other sets ``classes.name_of_set``."""
    source: Any
    config: EvalDataConfig
    """Resizing and crop."""
    parts: dict[str, range]
    """Name -> indices of its images in the source; each part is evaluated separately. One part named "", except in
    ImageNet-C: corruption/severity."""
    classes: list[int] | None = None
    """Indices of the set's classes among the network's: only these logits are used. None: all."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """Keys of a row's protocol that a validation set does not have."""

    @property
    def whole(self) -> bool | None:
        """Whether it has as many images as the released set; None for other sets."""
        return all(len(part) == IMAGES[self.name] for part in self.parts.values()) if self.name in IMAGES else None


class Joined(Dataset):
    """Several sets concatenated, each with its own transform, so that one loader reads them all."""

    def __init__(self, sets: Iterable[EvalSet]) -> None:
        self.sets = [(each.source, eval_transform(each.config)) for each in sets]
        self.starts = [0, *itertools.accumulate(len(source) for source, _ in self.sets)]

    def __len__(self) -> int:
        return self.starts[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """(number of the set, index in it)."""
        number = next(number for number, end in enumerate(self.starts[1:]) if index < end)
        return number, index - self.starts[number]

    def __getitem__(self, index: int) -> tuple[Tensor, int | list[int]]:
        number, index = self._locate(index)
        source, transform = self.sets[number]
        image, label = source[index]
        return (image if isinstance(image, Tensor) else transform(image)), label

    def prefetch(self, indices: Sequence[int]) -> None:
        """Announce a batch to the sets that hold its images."""
        batches: dict[int, list[int]] = {}
        for number, index in map(self._locate, indices):
            batches.setdefault(number, []).append(index)
        for number, batch in batches.items():
            prefetch_samples(self.sets[number][0], batch)

    def path(self, index: int) -> str:
        """An image's name."""
        number, index = self._locate(index)
        return name_sample(self.sets[number][0], index)


class RealLabels(Encoded):
    """ImageNet's validation images that have ReaL labels; a label is a list of the correct classes, padded with -1.

    Raises:
        InputError: an image's name is not that of a validation image.
    """

    def __init__(self, source: Encoded) -> None:
        labels = RealLabelsImagenet(range(IMAGES["imagenet"])).real_labels
        samples: list[tuple[str, int]] = []
        correct: list[list[int]] = []
        self.kept: list[int] = []
        for index, (name, label) in enumerate(source.samples):
            match = re.search(r"(?:^|[/:])(ILSVRC2012_val_\d{8})(?:\.\w+)?$", name)
            if match is None or f"{match[1]}.JPEG" not in labels:
                raise InputError(f"imagenet-real: {name} is not named ILSVRC2012_val_00000001 to _00050000")
            if labels[f"{match[1]}.JPEG"]:
                samples.append((name, label))
                correct.append(labels[f"{match[1]}.JPEG"])
                self.kept.append(index)
        super().__init__(source.root, source.classes, samples)
        self.left_out = source.left_out
        self.source, width = source, max(map(len, correct), default=1)
        self._correct = torch.tensor([[*each, *[-1] * (width - len(each))] for each in correct]).share_memory_()

    def prefetch(self, indices: Sequence[int]) -> None:
        """Announce the images that are read next."""
        self.source.prefetch([self.kept[index] for index in indices])

    def read(self, index: int) -> bytes:
        """An image's bytes."""
        return self.source.read(self.kept[index])

    def label(self, index: int) -> list[int]:
        """An image's classes, padded with -1."""
        return self._correct[index].tolist()


def wnids() -> list[str]:
    """ImageNet's 1,000 classes in the order of every network's logits."""
    return ImageNetInfo().label_names()


def _subset(name: str) -> list[str]:
    """The classes of a set, sorted as their folders are."""
    if name == "imagenet-v2":  # numbers, without leading zeros
        return [str(label) for label in range(len(wnids()))]
    if name in ("imagenet-a", "imagenet-r"):
        file = f"_info/imagenet_{name[-1]}_synsets.txt"
        return importlib.resources.files("timm.data").joinpath(file).read_text(encoding="utf-8").split()
    return wnids()


def corruptions() -> tuple[dict[str, float], list[str]]:
    """ImageNet-C's 15 corruptions with AlexNet's error on each, a fraction; and the 4 extra ones outside the mCE."""
    content = yaml.safe_load(importlib.resources.files(__package__).joinpath("imagenet_c.yaml").read_text("utf-8"))
    return content["alexnet_error"], content["extra"]


def choose(names: list[str] | None, partial: bool) -> Sequence[str | None]:
    """The test sets of --dataset, each once; [None], the recipe's validation set, where there are none.

    Raises:
        InputError: ``partial`` (--partial) without ImageNet-C.
    """
    if not names:
        return [None]
    names = list(IMAGES) if "all" in names else list(dict.fromkeys(names))
    if partial and "imagenet-c" not in names:
        raise InputError("--partial belongs to --dataset imagenet-c")
    return names


def open_set(
    name: str | None,
    config: EvalDataConfig,
    split: str,
    num_classes: int,
    partial: bool = False,
    classes: list[str] | None = None,
) -> EvalSet:
    """The set to evaluate on.

    Args:
        name: one of ``IMAGES``; None for the recipe's validation set.
        config: as ``protocol.adapt`` returns it.
        split: folder below ``config.root``, as ``protocol.adapt`` returns it.
        num_classes: the network's number of classes.
        partial: accept an ImageNet-C without some of its folders.
        classes: those that the network was trained on, where known; they stand for the file ``config.classes``.

    Raises:
        InputError: the set does not exist or misses classes, or the network does not have ImageNet's 1,000.
    """
    known, protocol = wnids(), dict[str, Any]()
    if name is None:
        selection = "\n".join(classes) if config.classes and classes else None
        # Class folders may be some of ImageNet's.
        part = config.name == "folder" and config.classes is None and num_classes == len(known)
        source = build_sources(config, None if part else num_classes, (split,), selection, names=classes)[0]
        names = list(source.classes)
        if names == known:
            return EvalSet("imagenet", source, config, _whole(source))
        indices = indices_of(names, num_classes, known)
        if indices is not None:
            protocol = {"classes": len(names), "scoring": f"among the set's {len(names)} classes"}
        own_name = name_of_set(config, split, IMAGES)
        return EvalSet(own_name, source, config, _whole(source), indices, protocol)
    if num_classes != len(known):
        raise InputError(f"--dataset {name} needs a network of ImageNet's 1,000 classes; this one has {num_classes}")
    assert config.root is not None  # adapt's
    root = Path(config.root).expanduser() / split
    if name != "imagenet":
        protocol["test_set"] = name
    if name in _SCORING:
        protocol["scoring"] = _SCORING[name]
    if name == "imagenet-c":
        source, parts = _open_corruptions(root, config, partial)
        if partial and (missing := _missing(parts)):
            protocol["lacks"] = missing
        return EvalSet(name, source, config, parts, protocol=protocol)
    if name in ("imagenet", "imagenet-real"):
        if config.name == "folder":
            _check_classes(name, root, known)
        source = build_sources(config, num_classes, (split,))[0]
        if list(source.classes) != known:
            raise InputError(f"--dataset {name}: the classes of {root} are not ImageNet's")
        if name == "imagenet-real":
            assert isinstance(source, Encoded)  # sets with ImageNet's class names are files
            source = RealLabels(source)
        return EvalSet(name, source, config, _whole(source), protocol=protocol)
    subset = _subset(name)
    _check_classes(name, root, subset)
    source = Folder(root, subset)
    say_left_out(source)
    indices = None if len(subset) == len(known) else [known.index(wnid) for wnid in subset]
    return EvalSet(name, source, config, _whole(source), indices, protocol)


def _whole(source: Any) -> dict[str, range]:
    return {"": range(len(source))}


def _check_classes(name: str, root: Path, classes: list[str]) -> None:
    """Check that a directory has these class folders and no others.

    Raises:
        InputError: it has not.
    """
    try:
        folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise InputError(f"--dataset {name}: cannot read {root}: {error.strerror}") from error
    missing = [label for label in classes if label not in folders]
    extra = sorted(folders - set(classes))
    problems = [
        f"{len(names)} {what}, the first is {names[0]!r}"
        for names, what in ((missing, "are missing"), (extra, "are of other names"))
        if names
    ]
    if problems:
        raise InputError(
            f"--dataset {name}: {root} must hold {len(classes):,} class folders such as {classes[0]}; "
            + "; ".join(problems)
        )


def _missing(parts: Iterable[str]) -> list[str]:
    """The corruption/severity folders that ImageNet-C's ``parts`` miss; an extra corruption may be missing whole."""
    counted, extra = corruptions()
    present = set(parts)
    required = [*counted, *(name for name in extra if any(part.startswith(f"{name}/") for part in present))]
    return [part for name in required for severity in range(1, 6) if (part := f"{name}/{severity}") not in present]


def _open_corruptions(root: Path, config: EvalDataConfig, partial: bool) -> tuple[Encoded, dict[str, range]]:
    """root/corruption/severity/wnid/, also with a folder above the corruptions, as the archives are named."""
    counted, extra = corruptions()
    folders = {
        path.name: path
        for pattern in ("*/*", "*")
        for path in root.glob(pattern)
        if path.name in (*counted, *extra) and path.is_dir()
    }
    part_folders = {
        f"{name}/{severity}": folders[name] / str(severity)
        for name in (*counted, *extra)
        for severity in range(1, 6)
        if name in folders and (folders[name] / str(severity)).is_dir()
    }
    if not folders.keys() & counted.keys():
        raise InputError(f"--dataset imagenet-c: {root} has none of the corruptions {', '.join(counted)}")
    if (missing := _missing(part_folders)) and not partial:
        raise InputError(
            f"--dataset imagenet-c: {len(missing)} folders (corruption/severity) are missing in {root}, the first is "
            f"{missing[0]}; --partial evaluates the others, without an mCE"
        )
    known = wnids()
    samples: list[tuple[str, int]] = []
    left_out: list[LeftOut] = []
    parts: dict[str, range] = {}
    for part, folder in part_folders.items():
        _check_classes("imagenet-c", folder, known)
        images = Folder(folder, known)
        left_out.append(images.left_out)
        parts[part] = range(len(samples), len(samples) + len(images))
        samples += images.samples
    sizes = {part: len(images) for part, images in parts.items()}
    fewest, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[fewest] != sizes[most]:
        raise InputError(
            f"--dataset imagenet-c: {fewest} has {sizes[fewest]:,} images and {most} {sizes[most]:,}; they must have "
            "the same number"
        )
    source = Files(root, known, samples)
    source.left_out = LeftOut.sum(left_out)
    say_left_out(source)
    width, height = source[0][0].size
    if config.eval_resize == SIDE_OF_C and (width, height) != (SIDE_OF_C, SIDE_OF_C):
        raise InputError(
            f"--dataset imagenet-c: {source.path(0)} is {width}x{height}; the released images are "
            f"{SIDE_OF_C}x{SIDE_OF_C} crops; evaluate others with --resize and --size"
        )
    return source, parts
