"""Whether weights belong to an evaluation: its normalisation and its classes are those that they were trained with."""

from typing import Any

from timm.data import ImageNetInfo

from lip_resnet.config import Config, InputError
from lip_resnet.data.fingerprint import class_names
from lip_resnet.evaluation.protocol import EvalConfig
from lip_resnet.evaluation.testsets import EvalSet, wnids


def check_normalization(trained: Config | None, config: EvalConfig, source: str) -> None:
    """Check that pixels are normalised as in the training.

    Args:
        trained: the recipe in the checkpoint ``source``; None where there is none: not checked.

    Raises:
        InputError: they are not.
    """
    for key in ("mean", "std"):
        theirs, ours = (getattr(part.data, key) if part else None for part in (trained, config))
        if theirs is not None and theirs != ours:
            raise InputError(
                f"{source} was trained with data.{key}={list(theirs)}, and would be evaluated with {list(ours)}; "
                "evaluate it by its own recipe, without --config and --model"
            )


def recorded_classes(payload: dict[str, Any]) -> list[str] | None:
    """The names of the classes that a checkpoint was trained on, in the order of its logits; None where unknown."""
    names = payload.get("class_names")
    known = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    return names if known else None


def check_class_names(payload: dict[str, Any], data: EvalSet, source: str) -> None:
    """Check that a set has the classes of the training, in the same order; unknown names are not checked.

    ImageNet-V2's folders are numbers, which stand for ImageNet's classes.

    Raises:
        InputError: a class has another name.
    """
    theirs = recorded_classes(payload)
    ours = wnids() if data.name == "imagenet-v2" else class_names(data.source, data.config.name)
    if theirs is None or ours is None:
        return
    if data.classes is not None:
        theirs = [theirs[index] for index in data.classes if index < len(theirs)]
    differing = [pair for pair in zip(_as_wnids(theirs), _as_wnids(ours), strict=False) if pair[0] != pair[1]]
    if differing:
        raise InputError(
            f"{source} was trained on other classes than those of {data.source.root}: {len(differing)} of {len(ours)} "
            f"differ, such as {differing[0][0]!r} in training and {differing[0][1]!r} here"
        )


def _as_wnids(names: list[str]) -> list[str]:
    """ImageNet's class names in words, as tables have them, as WordNet's numbers; other names as they are."""
    words = ImageNetInfo().label_descriptions()
    pairs = zip(names, words, strict=False)
    same = sum(name.split(",")[0] == word.split(",")[0] for name, word in pairs)
    return wnids() if len(names) == len(words) and same > 900 else names
