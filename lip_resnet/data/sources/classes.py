"""The one rule for the classes of every kind of source: the same names in all splits, and every label one of them."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lip_resnet import distributed
from lip_resnet.config import InputError

_MOST_NUMBERED = 1 << 20
"""Classes of a set that neither names them nor has a network, if it has no more images than this."""


def settle_classes(
    sources: Sequence[Any], splits: Sequence[str], num_classes: int | None, names: Sequence[str] | None = None
) -> None:
    """Give all sources the same ``classes``, and check every label; a class without images is a warning.

    Args:
        sources: of the splits; each has ``targets``, ``path`` and ``classes``, which is empty where its data names no
            classes. The names are then numbers: up to the highest label in training, or in an evaluation alone up to
            ``num_classes``.
        num_classes: of the network; None for any.
        names: of the classes that the network was trained on; None for those of the data.

    Raises:
        InputError: the splits differ in their classes, there are not ``num_classes``, or a label is none of them.
    """
    named = [(split, list(source.classes)) for split, source in zip(splits, sources, strict=True) if source.classes]
    for split, classes in named[1:]:
        if classes != named[0][1]:
            raise InputError(f"data.root: {explain_difference(*named[0], split, classes)}")
    if named:
        names = named[0][1]
    elif names is None:
        names = _numbers(sources[0], splits[0], num_classes)
    if num_classes is not None and len(names) != num_classes:
        raise InputError(f"model.num_classes is {num_classes}, but the data has {len(names)} classes")
    for split, source in zip(splits, sources, strict=True):
        images = np.bincount(_checked_labels(source, len(names)), minlength=len(names))
        empty = np.flatnonzero(images == 0)
        if len(empty) and distributed.is_main():
            share = f"{len(empty):,} of {len(names):,} classes"
            print(f"warning: {split} has no images of {share}, the first is {names[empty[0]]!r}", file=sys.stderr)
        source.classes = list(names)


def explain_difference(first: str, ours: Sequence[str], second: str, theirs: Sequence[str]) -> str:
    """One line on how the classes of two splits, named ``first`` and ``second``, differ."""
    only = ((first, sorted(set(ours) - set(theirs))), (second, sorted(set(theirs) - set(ours))))
    parts = [f"{len(names):,} only in {split}, the first is {names[0]!r}" for split, names in only if names]
    if not parts:  # the same names, in another order or some of them twice
        pairs = zip(ours, theirs, strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
        parts = [f"class {at} is {[*ours, None][at]!r} in {first} and {[*theirs, None][at]!r} in {second}"]
    return f"the classes of {first} and {second} differ: {'; '.join(parts)}"


def _checked_labels(source: Any, classes: int) -> np.ndarray:
    """Every label, each below ``classes``."""
    labels = np.asarray(source.targets)
    highest = int(labels.argmax())
    if labels[highest] >= classes:
        allowed = f"{classes} classes have the labels 0 to {classes - 1}"
        raise InputError(f"{source.path(highest)}: its label is {labels[highest]}; {allowed}")
    return labels


def _numbers(source: Any, split: str, num_classes: int | None) -> list[str]:
    """The labels as names."""
    limit = num_classes or max(len(source), _MOST_NUMBERED)
    count = 1 + int(_checked_labels(source, limit).max())
    return [str(label) for label in range(count if split == "train" or num_classes is None else num_classes)]
