"""An optimizer's parameter groups after a network has got new modules."""

from collections.abc import Sequence

import torch
from torch import nn


def move_parameters(
    optimizer: torch.optim.Optimizer, before: Sequence[tuple[str, nn.Parameter]], model: nn.Module
) -> None:
    """Take parameters that ``model`` has no more out of the optimizer, with their state, and put the new ones in.

    A new parameter joins the group of the one that had its name; else that of a parameter of its kind (weights with
    weights, vectors with vectors: groups without weight decay stay such), the nearest one in the same module, or in the
    one around it, and so on. It starts without state.

    Args:
        optimizer: of the model before its change.
        before: the model's named parameters before its change.
    """
    groups = enumerate(optimizer.param_groups)
    group_of = {id(parameter): number for number, group in groups for parameter in group["params"]}
    named = {name: group_of[id(parameter)] for name, parameter in before if id(parameter) in group_of}
    now = list(model.named_parameters())
    names = {id(parameter): name for name, parameter in now}
    for _, parameter in before:
        if id(parameter) not in names:
            optimizer.state.pop(parameter, None)
    known = {id(parameter) for _, parameter in before}
    added: dict[int, list[nn.Parameter]] = {}
    for index, (name, parameter) in enumerate(now):
        others = [(number, other, each) for number, (other, each) in enumerate(now) if id(each) in group_of]
        if id(parameter) in known or not others:
            continue
        nearest = min(
            others,
            key=lambda at: (
                (at[2].dim() > 1) != (parameter.dim() > 1),
                -_common_modules(at[1], name),
                abs(at[0] - index),
            ),
        )
        added.setdefault(named.get(name, group_of[id(nearest[2])]), []).append(parameter)
    for number, group in enumerate(optimizer.param_groups):
        group["params"] = [each for each in group["params"] if id(each) in names] + added.get(number, [])
        if "param_names" in group:  # of an optimizer that was given named parameters
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]


def _common_modules(one: str, other: str) -> int:
    """How many modules, from the outermost on, two parameters are both in."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), len(pairs))
