"""Names to networks: LIP nets and timm's baselines through one door, with one initialisation."""

import copy
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lip_resnet.config import InputError, ModelConfig

Replace = Callable[[nn.Module, Mapping[str, str]], Any]


def create_model(name: str, **keywords: Any) -> nn.Module:
    """``timm.create_model`` whose refusals are one line, with near names.

    Raises:
        InputError: unknown name; a keyword or value that the model does not take; a package that it needs is missing.
        Exception: whatever the network raises without any keywords too: that is a defect, not the user's.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"model.name: unknown model {name!r}; near names: {', '.join(near) or 'none'}")
    try:
        return timm.create_model(name, **keywords)
    except ImportError as error:
        raise InputError(f"model {name} needs a package that is not installed here: {error}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        with torch.device("meta"):
            timm.create_model(name)
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {name} does not take {keywords}: {line}") from error


def build_model(config: ModelConfig, replace: Replace, **keywords: Any) -> nn.Module:
    """The network of a recipe, initialised; ``config.weights`` is left to the caller.

    Args:
        replace: swaps downsampling layers of a model in place, for ``model.downsampling``.
        keywords: further ones of the model.
    """
    keywords["num_classes"] = config.num_classes
    if taken := sorted(config.args.keys() & {*keywords, "pretrained", "features_only", "checkpoint_path"}):
        raise InputError(f"model.args: {', '.join(taken)} cannot be set there; the recipe has keys of its own for it")
    model = create_model(config.name, **keywords, **config.args)
    initialize(model)
    if config.downsampling:
        try:
            report = replace(model, config.downsampling)
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


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: int) -> int:
    """Multiply-adds of the convolutions and linear layers for one ``size`` x ``size`` image (the papers' "FLOPs")."""
    trial = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trial(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2
