"""An optimizer's parameter groups after a network has got new modules."""

from collections.abc import Sequence

import torch
from torch import nn


def move_parameters(
    optimizer: torch.optim.Optimizer, before: Sequence[tuple[str, nn.Parameter]], model: nn.Module
) -> None:
    """Take parameters that ``model`` has no more out of the optimizer, with their state, and put the new ones in.

    A new parameter joins the group of the nearest parameter before it in the model that was there already and is of its
    kind (weights with weights, vectors with vectors: groups without weight decay stay such), else of the nearest of any
    kind. It starts without state.

    Args:
        optimizer: of the model before its change.
        before: the model's named parameters before its change.
    """
    groups = enumerate(optimizer.param_groups)
    group_of = {id(parameter): number for number, group in groups for parameter in group["params"]}
    now = list(model.parameters())
    kept = {id(parameter) for parameter in now}
    for _, parameter in before:
        if id(parameter) not in kept:
            optimizer.state.pop(parameter, None)
    added: dict[int, list[nn.Parameter]] = {}
    known = {id(parameter) for _, parameter in before}
    for index, parameter in enumerate(now):
        if id(parameter) in known:
            continue
        near = [each for each in [*now[index::-1], *now[index:]] if id(each) in group_of]
        alike = [each for each in near if (each.dim() > 1) == (parameter.dim() > 1)]
        if near:
            added.setdefault(group_of[id((alike or near)[0])], []).append(parameter)
    for number, group in enumerate(optimizer.param_groups):
        group["params"] = [each for each in group["params"] if id(each) in kept] + added.get(number, [])
