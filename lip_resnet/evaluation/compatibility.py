"""Whether weights belong to an evaluation: its normalisation and its classes are those that they were trained with."""

from typing import Any

from timm.data import ImageNetInfo

from lip_resnet.config import EvalDataConfig, InputError, Recipe
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.data.fingerprint import class_names
from lip_resnet.evaluation.testsets import EvalSet, wnids


def check_normalization(
    trained: Recipe | None, data: EvalDataConfig | EvalDetectionDataConfig, source: str, advice: str
) -> None:
    """Check that pixels are normalised as in the training of a checkpoint.

    Args:
        trained: the recipe in the checkpoint ``source``; None where there is none: not checked.

    Raises:
        InputError: they are not.
    """
    if trained is None:
        return
    for key in ("mean", "std"):
        theirs, ours = list(getattr(trained.data, key)), list(getattr(data, key))
        if theirs != ours:
            raise InputError(f"{source} was trained with data.{key}={theirs}, here it is {ours}; {advice}")


def recorded_classes(payload: dict[str, Any]) -> list[str] | None:
    """The names of the classes that a checkpoint was trained on, in the order of its logits; None where unknown."""
    names = payload.get("class_names")
    known = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    return names if known else None


def check_set(payload: dict[str, Any], data: EvalSet, source: str) -> None:
    """``check_class_names`` of a set; ImageNet-V2's folders are numbers, which stand for ImageNet's classes."""
    theirs = recorded_classes(payload)
    ours = wnids() if data.name == "imagenet-v2" else class_names(data.source, data.config.name)
    if theirs is not None and data.classes is not None:
        theirs = [theirs[index] for index in data.classes if index < len(theirs)]
    check_class_names(theirs, ours, source, "evaluate it on the classes that it was trained on")


def check_class_names(theirs: list[str] | None, ours: list[str] | None, source: str, advice: str) -> None:
    """Check that data have the classes of a checkpoint's training, in the same order.

    Args:
        theirs: the names of the classes in the checkpoint ``source``; None where unknown: not checked.
        ours: those of the data; None where unknown.

    Raises:
        InputError: a class has another name.
    """
    theirs, ours = _as_wnids(theirs or []), _as_wnids(ours or [])
    differing = [(one, two) for one, two in zip(theirs, ours, strict=False) if one != two]
    if differing:
        raise InputError(
            f"{source} was trained on other classes: {len(differing)} of {len(ours)} differ, such as "
            f"{differing[0][0]!r} there and {differing[0][1]!r} in these data; {advice}"
        )


def _as_wnids(names: list[str]) -> list[str]:
    """ImageNet's class names in words, as tables have them, as WordNet's numbers; other names as they are."""
    if len(names) != 1000:
        return names
    pairs = zip(names, ImageNetInfo().label_descriptions(), strict=True)
    same = sum(name.split(",")[0] == words.split(",")[0] for name, words in pairs)
    return wnids() if same > 900 else names
