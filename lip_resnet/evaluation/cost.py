"""Parameters and multiply-adds of a network, by two counting rules.

macs    convolutions and linear layers
flops   macs, plus 2 per output of a batch norm, 1 per output of a ReLU and 1 per input of a plain pooling; nothing for
        instance norms, gates and LIP itself. This is the rule of the counting tools of 2019 (ptflops: github.com/
        sovrasov/flops-counter.pytorch); it gives all six "FLOPs" that the reference prints, to the last digit.
"""

import copy
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: int) -> int:
    """Multiply-adds of the convolutions and linear layers for one ``size`` x ``size`` image (the papers' "FLOPs")."""
    return count_operations(model, size)[0]


def macs_of_map(module: nn.Module, channels: int, side: int) -> int:
    """Multiply-adds of a module on the meta device for one map (channels, side, side); ``count_macs``'s rule."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, channels, side, side, device="meta"))
    return counter.get_total_flops() // 2


def count_operations(model: nn.Module, size: int) -> tuple[int, int]:
    """(macs, flops) of one ``size`` x ``size`` image, by the two rules at the top of this file."""
    elementwise = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal elementwise
        if isinstance(module, nn.BatchNorm2d):
            elementwise += 2 * output.numel()
        elif isinstance(module, nn.ReLU) or any(isinstance(argument, nn.ReLU) for argument in inputs[1:]):
            elementwise += output.numel()  # a ReLU module, or one that a norm is called with and applies
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d | SelectAdaptivePool2d):
            elementwise += inputs[0].numel()

    meta_model = copy.deepcopy(model).to("meta").eval()
    for module in meta_model.modules():
        module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model(torch.empty(1, 3, size, size, device="meta"))
    macs = counter.get_total_flops() // 2
    return macs, macs + elementwise
