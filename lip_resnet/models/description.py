"""What a network computes beside its weights, and whether it is the network that a checkpoint's recipe names.

Pooling, activations, strides and gates have no parameters: weights of one network load strictly into another.
"""

from typing import Any

import torch
from torch import nn

from lip_resnet.checkpoint import read_recipe
from lip_resnet.config import InputError, ModelConfig
from lip_resnet.models.registry import build_model
from lip_resnet.recipe import parse_section

_WITHOUT_EFFECT = {
    *("training", "momentum", "inplace", "num_classes", "num_batches_tracked"),
    *("grad_checkpointing", "recompute", "fused_attn"),
}
"""Attributes that change no output in evaluation, or that the shapes of the weights show."""


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def describe_network(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the modules of a network compute: name of the module -> its class, and its attributes.

    Attributes are numbers, strings and tuples of them. Dropout, stochastic depth and identities are left out, and
    batch norm is the same whether it is synchronized or not.
    """
    description = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Identity) or kind.startswith(("Drop", "PatchDrop")):
            continue
        if isinstance(module, _BATCH_NORMS):
            description[name] = {"class": "batch norm", "eps": module.eps}
            continue
        attributes = {
            attribute: value
            for attribute, value in vars(module).items()
            if not attribute.startswith("_") and attribute not in _WITHOUT_EFFECT and "drop" not in attribute
        }
        description[name] = {"class": kind} | {name: value for name, value in attributes.items() if _is_plain(value)}
    return description


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def recorded_network(payload: dict[str, Any], source: str) -> ModelConfig | None:
    """The ``model`` section of a checkpoint's recipe, or that of an exported file; None where there is none to read."""
    try:
        recipe = read_recipe(payload, source)
        if recipe is not None:
            return recipe.model
        network = payload.get("architecture")
        return parse_section(network, source, ModelConfig) if isinstance(network, dict) else None
    except InputError:  # not of this version: its weights alone decide
        return None


def check_network(model: nn.Module, payload: dict[str, Any], source: str, heads: tuple[str, ...] = ()) -> None:
    """Check that a network computes what the recipe of a checkpoint says; files without a recipe are not checked.

    Args:
        heads: names of modules that are not compared: new classifiers.

    Raises:
        InputError: it does not; the message names what differs.
    """
    recorded = recorded_network(payload, source)
    if recorded is None:
        return
    try:
        with torch.device("meta"):
            trained = build_model(recorded.model_copy(update={"weights": None}))
    except InputError:  # such as a network of another package: its weights alone decide
        return
    theirs, ours = describe_network(trained), describe_network(model)
    if type(trained) is not type(model):  # the same layers in other containers, as torchvision's
        leaves = {name for name, module in trained.named_modules() if not any(module.children())} & ours.keys()
        theirs, ours = ({name: each[name] for name in leaves & theirs.keys()} for each in (theirs, ours))
    differences = [
        _difference(name, theirs.get(name), ours.get(name))
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and name not in heads
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(
            f"{source}: trained as another network, {_spell(recorded)}: {'; '.join(differences[:3])}{more}"
        )


def _difference(name: str, theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    if theirs is None or ours is None or theirs["class"] != ours["class"]:
        one, two = (module["class"] if module else "nothing" for module in (theirs, ours))
        return f"{name or 'it'} is {one} in the file, {two} here"
    key = next(key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key))
    return f"{name}.{key}".lstrip(".") + f" is {theirs.get(key)} in the file, {ours.get(key)} here"


def _spell(config: ModelConfig) -> str:
    parts = {key: getattr(config, key) for key in ("args", "downsampling", "circular_padding")}
    return ", ".join([config.name, *(f"model.{key}={value}" for key, value in parts.items() if value)])[:300]
