"""How weights are evaluated: the network, the images, resizing and crop, the precision; and its record in rows.

``describe_protocol`` and ``describe_training`` are what a row records; two accuracies may be subtracted only where
``difference`` of their records is None.
"""

import math
from typing import Any, Literal

import timm

from lip_resnet.config import (
    Config,
    DetectionConfig,
    Effect,
    EvalDataConfig,
    InputError,
    ModelConfig,
    Section,
    effects_of,
)
from lip_resnet.evaluation.location import locate
from lip_resnet.evaluation.testsets import SIDE_OF_C
from lip_resnet.recipe import parse_section

_KEYS_OF_KIND = {"download": False, "label_column": None, "classes": None, "train": (), "val": ()}
"""Data keys that belong to one ``data.name``, and their values for the others."""

ADDED_KEYS = {"crop_mode": "center"}
"""Keys of a protocol that rows of earlier versions do not have, and their values in those versions."""


class EvalConfig(Section):
    """Network, images and precision of an evaluation."""

    model: ModelConfig
    data: EvalDataConfig
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the autocast forward."""
    channels_last: bool = True

    @classmethod
    def from_recipe(cls, config: Config) -> "EvalConfig":
        """The evaluation of a recipe's validation set, in float32."""
        data = config.data.model_dump(include=set(EvalDataConfig.model_fields))
        return cls(model=config.model, data=EvalDataConfig(**data), channels_last=config.train.channels_last)


def timm_protocol(name: str, pretrained_cfg: dict[str, Any]) -> EvalConfig:
    """timm's own evaluation of a model, as its validate.py resolves it: test size, crop, interpolation, normalisation.

    Args:
        name: the model's name.
        pretrained_cfg: timm's ``pretrained_cfg`` of the model, as a dict.

    Raises:
        InputError: the images are not square RGB or are padded, or ``EvalDataConfig`` refuses a value.
    """
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=pretrained_cfg, use_test_size=True)
    channels, height, width = resolved["input_size"]
    if channels != 3 or height != width:
        raise InputError(
            f"--model {name}: timm evaluates it on {height}x{width} images of {channels} channels; this code evaluates "
            "on square images of 3 channels: give a recipe with --config, with an eval_size of its own"
        )
    resize = math.floor(height / resolved["crop_pct"])
    if height > resize:
        raise InputError(
            f"--model {name}: timm resizes to {resize} pixels and pads to {height}; this code crops from the resized "
            "image: give a recipe with --config, with an eval_resize of its own"
        )
    tree = {
        "model": {"name": name, "num_classes": pretrained_cfg.get("num_classes") or 1},
        "data": {
            "root": ".",
            "eval_size": height,
            "eval_resize": resize,
            **{key: resolved[key] for key in ("crop_mode", "interpolation", "mean", "std")},
        },
    }
    return parse_section(tree, f"--model {name}", EvalConfig)


def reference_protocol(model: str, num_classes: int, trained: Config | None = None) -> EvalConfig:
    """The reference's evaluation: PIL bilinear resize to 256, centre crop of 224, float32, contiguous tensors.

    Args:
        trained: the recipe of a run, whose ``data.name`` and normalisation are kept; None: class folders or shards.
    """
    keys = ("name", "root", "train", "val", "download", "label_column", "classes", "mean", "std")
    source = {key: getattr(trained.data, key) for key in keys} if trained else {"root": "."}
    network = ModelConfig(name=model, num_classes=num_classes)
    return EvalConfig(model=network, data=EvalDataConfig(**source), channels_last=False)


def adapt(
    config: EvalConfig,
    test_set: str | None = None,
    data: str | None = None,
    *,
    several: bool = False,
    kind: str | None = None,
    precision: str | None = None,
    **keys: Any,
) -> tuple[EvalConfig, str]:
    """Apply the command line to an evaluation: the evaluation of one set, and its split (folder below ``data.root``).

    Args:
        test_set: one of ``testsets.IMAGES``; None for the recipe's validation set.
        data: --data; None: the recipe's ``data.root``.
        several: whether ``data`` must be the directory of several test sets, not one of them.
        kind: --data-name, the ``data.name`` of the images at ``data``; None: the recipe's.
        precision, keys: overrides of ``precision`` and of keys of ``data``; None: unchanged. An ``eval_size`` without
            ``eval_resize`` scales that too.

    Raises:
        InputError: as ``locate``; a test set without ``data``; or keys that contradict each other.
    """
    tree, split = config.model_dump(), "val"
    if data is not None:
        named = config.data.val if config.data.name == "shards" else ()
        location, split = locate(data, test_set, several, kind or config.data.name, named)
        tree["data"] |= ({} if location["name"] == config.data.name else _KEYS_OF_KIND) | {"train": ()} | location
    elif kind is not None:
        raise InputError(f"--data-name {kind} belongs to --data DIR")
    elif test_set is not None and (test_set not in ("imagenet", "imagenet-real") or config.data.root is None):
        raise InputError(f"--data is missing: the directory that holds {test_set}")
    if test_set == "imagenet-c":  # its images are crops
        side = keys.get("eval_size") or SIDE_OF_C
        tree["data"] |= {"eval_size": side, "eval_resize": side, "crop_mode": "center"}
    elif keys.get("eval_size") and not keys.get("eval_resize"):  # the crop keeps its share of the image, as timm's does
        tree["data"]["eval_resize"] = config.data.eval_resize * keys["eval_size"] // config.data.eval_size
    tree["data"] |= {key: value for key, value in keys.items() if value is not None}
    tree["precision"] = precision or config.precision
    return parse_section(tree, "evaluation", EvalConfig), split


def describe_training(
    config: Config | DetectionConfig,
    processes: list[int],
    initial_weights: dict[str, Any] | None = None,
    datasets: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """How weights were trained: every key of the recipe that changes them, except the model and the seed.

    Args:
        config: the recipe that they were trained with, as in the checkpoint.
        processes: the number of processes of each part of the training, in order; usually one part.
        initial_weights: the checkpoint's ``initial_weights``. Weights that a run started from are compared by the
            digest of their tensors, by their own training where it is known, else by the file's sha256; None (older
            checkpoints): by the recipe's path.
        datasets: the checkpoint's ``datasets``. A selection by ``data.classes`` is compared by the digest of the
            training images' names; None (older checkpoints): by the recipe's path.
    """
    training = {key: value for key, value in config.values(Effect.WEIGHTS).items() if not key.startswith("model.")}
    del training["train.seed"]
    start: Any = config.model.weights if isinstance(config, Config) else config.model.backbone.weights
    if start is not None and isinstance(initial_weights, dict):
        start = initial_weights.get("training") or {"sha256": initial_weights.get("sha256")}
        start = {**start, "content": initial_weights.get("content")}
    training["model.weights"] = start
    if isinstance(config, Config):
        selection: Any = config.data.classes
        train_set = datasets.get("train") if isinstance(datasets, dict) else None
        if selection is not None and isinstance(train_set, dict):
            selection = train_set.get("names") or selection
        training |= {"model.new_head": config.model.new_head, "data.classes": selection}
    # Batch norm sees this many images: with another number of processes it is another experiment.
    shares = [config.optim.accumulate * (1 if config.train.sync_bn else count) for count in processes]
    training["images_per_batch_norm"] = ", then ".join(str(config.data.batch_size // share) for share in shares)
    return training


def update_training(training: dict[str, Any], task: str = "classification") -> dict[str, Any]:
    """``describe_training`` of an earlier version in today's form: neutral keys dropped, new keys at their defaults."""
    common = {"optim": {"lr": 1.0}, "train": {"epochs": 1}}
    minimal: Config | DetectionConfig
    if task == "detection":
        detector = {"model": {"backbone": {"name": "-"}}, "data": {"name": "digit_scenes", "batch_size": 1}}
        minimal = DetectionConfig.model_validate({**detector, **common})
    else:
        classifier = {"model": {"name": "-"}, "data": {"name": "digits", "batch_size": 1}}
        minimal = Config.model_validate({**classifier, **common})
    defaults, keys = describe_training(minimal, [1]), effects_of(type(minimal))
    return defaults | {key: value for key, value in training.items() if key in defaults or key not in keys}


def describe_protocol(
    config: EvalConfig, training: dict[str, Any] | None, test_set: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All that must be equal before two accuracies may be subtracted: data, evaluation and training.

    Args:
        config: the evaluation.
        training: ``describe_training`` of the weights; None where it is unknown.
        test_set: ``EvalSet.protocol``: name and scoring of a test set; empty for a recipe's validation set.
    """
    data = config.data.model_dump(mode="json")
    images = {"data": data["name"], "classes": config.model.num_classes, **(test_set or {})}
    evaluation = {key: data[key] for key in ("eval_size", "eval_resize", "crop_mode", "interpolation", "mean", "std")}
    evaluation |= {"precision": config.precision, "decode": "exact", "views": "one centre crop"}
    return {**images, **evaluation, "training": training}


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first key in which two protocols differ, with both values; None where they are equal."""
    ours, theirs = {**ADDED_KEYS, **ours}, {**ADDED_KEYS, **theirs}
    for part, other in ((ours, theirs), (ours.get("training") or {}, theirs.get("training") or {})):
        for key in sorted(part.keys() | other.keys()):
            one, two = part.get(key), other.get(key)
            if key in ("training", "content") or one == two or (key == "model.weights" and _same_initial(one, two)):
                continue
            return _compare_initial(one, two) if key == "model.weights" else f"{key}: {one} against {two}"
    return None


def _same_initial(ours: Any, theirs: Any) -> bool:
    """Whether two values of ``model.weights`` in ``describe_training`` are of the same weights or the same training."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return False
    if any(ours.get(key) is not None and ours.get(key) == theirs.get(key) for key in ("content", "sha256")):
        return True
    unknown = "sha256" in ours or "sha256" in theirs
    return not unknown and difference({"training": ours}, {"training": theirs}) is None


def _compare_initial(ours: Any, theirs: Any) -> str:
    """In words, how two different values of ``model.weights`` in ``describe_training`` differ."""
    kinds = [_describe_initial(start) for start in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return f"model.weights: started from {kinds[0]} against {kinds[1]}"
    if "sha256" in ours:
        return "model.weights: started from two different files whose training is unknown"
    return f"model.weights: the weights started from differ in {difference({'training': ours}, {'training': theirs})}"


def _describe_initial(start: Any) -> str:
    if not isinstance(start, dict):
        return str(start or "random weights")
    return "a file of unknown training" if "sha256" in start else "weights of a known training"
