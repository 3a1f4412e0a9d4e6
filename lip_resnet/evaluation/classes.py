"""The classes of a validation set and those of the network: equal, a part of ImageNet's by their wnids, or others."""

from collections.abc import Container, Sequence
from pathlib import Path

from lip_resnet.config import EvalDataConfig, InputError


def name_of_set(config: EvalDataConfig, split: str, reserved: Container[str]) -> str:
    """What rows call a set: the name of its folder, or ``data.name`` where it is not in a folder of its own.

    Args:
        split: its folder below ``config.root``, of which ``val`` is not its name.
        reserved: names of test sets, which a folder of other images may have too.
    """
    if config.name not in ("folder", "shards", "huggingface") or config.root is None:
        return config.name
    root = Path(config.root).expanduser()
    name = split if split not in ("", "val") else root.name or root.resolve().name
    return config.name if name in reserved else name


def indices_of(names: Sequence[str], num_classes: int, wnids: Sequence[str]) -> list[int] | None:
    """The logits that belong to a set's classes; None: all, in the set's order.

    Args:
        names: the set's classes; their folders, if these are of ImageNet's classes, are named by wnid.
        num_classes: of the network.
        wnids: ImageNet's classes in the order of the logits.

    Raises:
        InputError: the network has another number of classes, and ``names`` are not some of ImageNet's.
    """
    if len(names) == num_classes:
        return None
    line = f"model.num_classes is {num_classes}, but the data has {len(names)} classes"
    if num_classes != len(wnids):
        raise InputError(line)
    if unknown := [name for name in names if name not in wnids]:
        raise InputError(
            f"{line}; some of ImageNet's 1,000 can be evaluated in folders of their wnids, such as {wnids[0]}, which "
            f"{unknown[0]!r} is not"
        )
    return [wnids.index(name) for name in names]


def note_on_names(names: Sequence[str], wnids: Sequence[str]) -> str | None:
    """A line for weights of ImageNet's number of classes: the set's are a part of these, or have other names.

    Numbers in order of value, as of shards without names, are not other names.
    """
    numbers = [str(label) for label in range(len(wnids))]
    if len(names) < len(wnids):
        return f"{len(names)} of ImageNet's {len(wnids):,} classes: accuracy is among these"
    if list(names) in (list(wnids), numbers):
        return None
    note = f"the classes are not named by ImageNet's wnids, the first is {names[0]!r}: label i is the i-th in order of "
    note += "names; if the network was trained with another order, accuracy is at chance"
    if set(names) == set(numbers):
        note += "; --dataset imagenet-v2 reads folders 0 to 999 in order of value"
    return note
