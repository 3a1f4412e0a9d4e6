"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from lip_resnet.config import InputError, OptimConfig
from lip_resnet.config.optim import OWN_OPTIMIZERS, optimizer_problem

_TIMM_NAMES = {"sgd": "momentum"}  # timm's sgd is Nesterov's


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer over ``_parameter_groups``.

    SGD and AdamW are fused: one pass over the parameters, and no synchronisation under float16's scaler. Not on MPS,
    where it is not known that the fused ones skip a step that is not finite. Optimizers that are not
    ``OWN_OPTIMIZERS`` have timm's defaults, and keywords from ``config.args``.

    Raises:
        InputError: timm has no such optimizer; it takes other keywords, or needs a package or GPU that is not here.
    """
    if problem := optimizer_problem(config.name):
        raise InputError(f"optim.name: {problem}")
    name, options = _TIMM_NAMES.get(config.name, config.name), dict[str, Any](config.args)
    if config.name in ("adamw", "lamb"):
        options["betas"] = config.betas
    if config.name == "lamb":
        options["max_grad_norm"] = None  # no clipping inside the optimizer: clip_norm alone decides
    if config.name in ("sgd", "adamw"):
        options["fused"] = next(model.parameters()).device.type != "mps"
    if config.nesterov:
        name = "nesterov"
    options |= {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    parameters = _parameter_groups(model, config)
    try:
        optimizer = create_optimizer_v2(parameters, opt=name, **options)
    except (TypeError, ValueError, AssertionError, ImportError, AttributeError) as error:
        if config.name in OWN_OPTIMIZERS:
            raise
        given = f" with optim.args {config.args}" if config.args else ""
        raise InputError(f"optim.name: {config.name}{given}: {str(error).splitlines()[0]}") from error
    if config.name == "sgd" and config.momentum:
        # If torch's first step is skipped (as float16's usually is), it leaves the momentum uninitialised.
        for parameter in model.parameters():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _parameter_groups(model: nn.Module, config: OptimConfig) -> Any:
    """All parameters in one group; or those that decay (``config.decay``), and the layers of ``layer_decay``, apart.

    Groups of layers have an ``lr_scale``, the factor of the step's learning rate.
    """
    matrices = config.decay == "matrices"
    if config.layer_decay < 1:
        return param_groups_layer_decay(
            model, config.weight_decay, weight_decay_exclude_1d=matrices, layer_decay=config.layer_decay
        )
    if matrices:
        return param_groups_weight_decay(model, config.weight_decay)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lr_at(step: int, config: OptimConfig, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0).

    Warm-up: lr * (step + 1) / (warm-up steps). After it lr * gamma^(milestones passed), the reference code's rule; or a
    cosine or a straight line from lr, at the end of the warm-up, to min_lr, at step epochs * steps_per_epoch.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    progress = min(1.0, (step - warmup) / (epochs * steps_per_epoch - warmup))
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
