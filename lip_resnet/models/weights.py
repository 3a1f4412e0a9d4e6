"""Weights out of a checkpoint of any origin, and into a model: all of them or none."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lip_resnet.checkpoint import load, resolve
from lip_resnet.config import InputError


def extract_weights(payload: dict[str, Any], source: str, ema: bool = False) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes that DDP, FSDP and torch.compile add to its keys.

    Args:
        payload: our checkpoint (keys ``model``, ``ema``), the reference's or timm's (``state_dict``,
            ``state_dict_ema``), or a state dict.
        source: the checkpoint's name in errors.
        ema: return the averaged (EMA) weights.

    Raises:
        InputError: there are no weights, or no averaged ones with ``ema``.
    """
    if "format" in payload and "model" in payload:
        state = payload["ema"] if ema else payload["model"]
    elif "state_dict" in payload or "state_dict_ema" in payload:
        state = payload.get("state_dict_ema") if ema else payload.get("state_dict", payload.get("state_dict_ema"))
    else:
        state = None if ema else payload
    if state is None:
        raise InputError(f"{source}: holds no averaged (EMA) weights")
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{source}: holds no weights; its keys: {_sample(payload)}")
    return _without_wrappers(state)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the names that wrappers insert into its keys, in any nesting.

    The names of torch.compile, FSDP and activation checkpointing are removed wherever they occur. DDP's ``module.`` is
    removed only as a prefix of all keys: a network may have a child of that name.
    """
    wrapper = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
    state = {wrapper.sub("", key): value for key, value in state.items()}
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load_weights(model: nn.Module, path: str | Path, *, ema: bool = False, new_head: bool = False) -> None:
    """Load the weights of a file into a model, completely or not at all.

    Args:
        model: a timm model; its ``checkpoint_filter_fn``, if any, maps released keys to its own.
        path: a released LIP checkpoint, the reference's training checkpoint, ours (a run folder or a file), timm's or
            torchvision's; ``.pth``, ``.pt`` or ``.safetensors``.
        ema: load the averaged (EMA) weights.
        new_head: keep the model's classifier instead of the file's (fine-tuning on other classes).

    Raises:
        InputError: the file is missing or no checkpoint, or its keys or shapes are not the model's (all are counted).
    """
    path = resolve(path)
    put_weights(model, load(path), str(path), ema=ema, new_head=new_head)


def put_weights(
    model: nn.Module, payload: dict[str, Any], path: str, *, ema: bool = False, new_head: bool = False
) -> None:
    """As ``load_weights``, from a checkpoint that has been read; ``path`` is its name in errors.

    Raises:
        InputError: there are no weights, or their keys or shapes are not the model's.
    """
    state = extract_weights(payload, path, ema)
    rename = getattr(model, "checkpoint_filter_fn", None)
    if rename is not None:
        state = rename(state, model)
    expected = model.state_dict()
    if new_head:
        cfg: Any = model.default_cfg
        heads = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
        state |= {key: value for key, value in expected.items() if key.rpartition(".")[0] in heads}
    problems = []
    for label, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unknown", [key for key in state if key not in expected]),
        ("of another shape", [key for key in expected if key in state and state[key].shape != expected[key].shape]),
        # load_state_dict would discard the imaginary parts
        ("complex", [key for key in expected if key in state and state[key].is_complex()]),
    ):
        if keys:
            problems.append(f"{len(keys)} keys {label} ({_sample(keys)})")
    if problems:
        hint = ""
        if not new_head and all("of another shape" in problem for problem in problems):
            hint = "; for another number of classes set model.new_head: true"
        raise InputError(f"{path}: not the weights of this {type(model).__name__}: {'; '.join(problems)}{hint}")
    model.load_state_dict(state)


def _sample(keys: Iterable[Any]) -> str:
    names = [str(key) for key in keys]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
