"""Head first (``train.freeze_epochs``): the classifier of a pretrained network trains before the rest of it does."""

from typing import Any

import torch
from torch import nn

from lip_resnet.config import InputError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def classifier_of(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm model: one layer, or several heads.

    Raises:
        InputError: timm names none.
    """
    default_cfg: Any = getattr(model, "default_cfg", None) or {}
    names = default_cfg.get("classifier") or ()
    layers = [model.get_submodule(name) for name in ((names,) if isinstance(names, str) else names)]
    if not any(True for layer in layers for _ in layer.parameters()):
        raise InputError(f"train.freeze_epochs: timm names no classifier of {type(model).__name__}; set it to 0")
    return layers


def freeze_trunk(model: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """Let only the classifier's parameters require gradients, or all that the optimizer has.

    Frozen, batch norms normalise by their running statistics, which stay as they are; ``model.train()`` ends that. An
    optimizer skips parameters without gradients, so nothing else of it changes.
    """
    own = {id(parameter) for layer in classifier_of(model) for parameter in layer.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(not frozen or id(parameter) in own)
    for module in model.modules():
        if frozen and isinstance(module, _BATCH_NORMS):
            module.eval()
