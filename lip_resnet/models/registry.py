"""Names to networks: LIP networks and timm's baselines, built and initialised by the same rules."""

import copy
import difflib
from typing import Any

import timm
import torch
from torch import nn

from lip_resnet.config import InputError, ModelConfig
from lip_resnet.layers.replace import replace_downsampling


def create_model(name: str, **keywords: Any) -> nn.Module:
    """``timm.create_model`` whose refusals are one line, with near names.

    Raises:
        InputError: unknown name; a keyword or value that the model does not take; a package that it needs is missing.
        Exception: whatever the network raises without any keywords too: that is a defect, not the user's.
    """
    _check_name(name)
    try:
        return timm.create_model(name, **keywords)
    except ImportError as error:
        raise InputError(f"model {name} needs a package that is not installed here: {error}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        with torch.device("meta"):
            timm.create_model(name)
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name} does not take {keywords}: {line}") from error


def pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's description of a model: its classes, classifier and evaluation. Nothing is built.

    Raises:
        InputError: unknown name, or unknown tag of pretrained weights.
    """
    _check_name(name)
    try:
        return (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).to_dict()
    except RuntimeError as error:
        raise InputError(f"model.name: {name}: {error}") from error


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"model.name: unknown model {name!r}; near names: {', '.join(near) or 'none'}")


def build_model(config: ModelConfig, **keywords: Any) -> nn.Module:
    """The network of a recipe, initialised; the caller loads ``config.weights``.

    Args:
        config: the recipe's ``model`` section.
        keywords: further keyword arguments of the model.

    Raises:
        InputError: unknown model, keyword or layer, or weights that do not fit.
    """
    keywords["num_classes"] = config.num_classes
    if taken := sorted(config.args.keys() & {*keywords, "pretrained", "features_only", "checkpoint_path"}):
        raise InputError(f"model.args: {', '.join(taken)} cannot be set there; the recipe has keys of its own for it")
    model = create_model(config.name, **keywords, **config.args)
    initialize(model)
    if config.downsampling:
        try:
            report = replace_downsampling(model, config.downsampling)
        except ValueError as error:
            raise InputError(f"model.downsampling: {error}") from error
        swapped = {what.partition(",")[0] for what in report.swapped.values()}
        if missed := sorted(set(config.downsampling) - swapped):
            raise InputError(f"model.downsampling: {config.name} has nothing to replace at {', '.join(missed)}")
    return model


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Give every residual network, LIP or not, the reference's classifier N(0, 0.01), bias 0, and zero last BNs.

    timm's ResNets bring their own classifier initialisation; a comparison must not depend on it.
    """
    blocks = [module for module in model.modules() if hasattr(module, "zero_init_last")]
    for block in blocks:
        block.zero_init_last()
    head = model.get_classifier()
    if blocks and isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)


def check_size(model: nn.Module, size: int) -> None:
    """Let a network see two images of ``size`` x ``size`` without computing anything.

    Raises:
        InputError: they are too small for it, or not of the one size that it takes.
        Exception: whatever the network raises on images of its default size too: that is a defect, not the user's.
    """
    trial = copy.deepcopy(model).to("meta").train()
    try:
        trial(torch.empty(2, 3, size, size, device="meta"))
    except (ValueError, RuntimeError, AssertionError) as error:
        trial(torch.empty(2, *model.default_cfg["input_size"], device="meta"))
        raise InputError(f"images of {size}x{size} do not fit this {type(model).__name__}: {error}") from error
