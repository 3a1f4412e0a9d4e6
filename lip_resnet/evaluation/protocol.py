"""How weights are evaluated: the network, the images, resizing and crop, the precision. Nothing of training."""

import math
from typing import Any, Literal

import timm

from lip_resnet.config import Config, EvalDataConfig, InputError, ModelConfig, Section
from lip_resnet.evaluation.location import locate
from lip_resnet.evaluation.testsets import SIDE_OF_C
from lip_resnet.recipe import parse_section

_KEYS_OF_KIND = {"download": False, "label_column": None, "classes": None}
"""Data keys that belong to one ``data.name``, and what they are for the others."""


class EvalConfig(Section):
    """An evaluation."""

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
        name: of the model.
        pretrained_cfg: timm's description of it.

    Raises:
        InputError: its images are not square RGB, or a value is none that ``EvalDataConfig`` takes.
    """
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=pretrained_cfg, use_test_size=True)
    channels, height, width = resolved["input_size"]
    if channels != 3 or height != width:
        raise InputError(
            f"--model {name}: timm evaluates it on {height}x{width} images of {channels} channels; this code evaluates "
            "on square images of 3 channels: give a recipe with --config, with an eval_size of its own"
        )
    tree = {
        "model": {"name": name, "num_classes": pretrained_cfg.get("num_classes") or 1},
        "data": {
            "root": ".",
            "eval_size": height,
            "eval_resize": math.floor(height / resolved["crop_pct"]),
            **{key: resolved[key] for key in ("crop_mode", "interpolation", "mean", "std")},
        },
    }
    return parse_section(tree, f"--model {name}", EvalConfig)


def adapt(
    config: EvalConfig,
    test_set: str | None = None,
    data: str | None = None,
    *,
    alone: bool = True,
    kind: str | None = None,
    precision: str | None = None,
    **keys: Any,
) -> tuple[EvalConfig, str]:
    """The evaluation on one set, with a command line's changes, and the folder below ``data.root`` (a split) to read.

    Args:
        test_set: one of ``testsets.IMAGES``; None for the recipe's validation set.
        data: --data; None leaves the images where the recipe has them.
        alone: whether ``data`` may be the test set itself, not only hold it.
        kind: --data-name, the ``data.name`` of what lies at ``data``; None: the recipe's own.
        precision, keys: values of the command line for ``precision`` and for keys of ``data``; None changes nothing.

    Raises:
        InputError: as ``locate``; a test set without ``data``; or keys that do not fit together.
    """
    tree, split = config.model_dump(), "val"
    if data is not None:
        location, split = locate(data, test_set, alone, kind or config.data.name)
        tree["data"] |= location | ({} if location["name"] == config.data.name else _KEYS_OF_KIND)
    elif kind is not None:
        raise InputError(f"--data-name {kind} belongs to --data DIR")
    elif test_set not in (None, "imagenet", "imagenet-real"):
        raise InputError(f"--data is missing: the directory that holds {test_set}")
    if test_set == "imagenet-c":  # it holds crops already
        side = keys.get("eval_size") or SIDE_OF_C
        tree["data"] |= {"eval_size": side, "eval_resize": side, "crop_mode": "center"}
    tree["data"] |= {key: value for key, value in keys.items() if value is not None}
    tree["precision"] = precision or config.precision
    return parse_section(tree, "evaluation", EvalConfig), split
