"""The weights in a checkpoint, whoever wrote it, and into a model: all of them or none."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lip_resnet.checkpoint import load, resolve
from lip_resnet.config import InputError


def extract_weights(payload: dict[str, Any], source: str, ema: bool = False) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: our own (``model``, ``ema``), the reference's or timm's (``state_dict``,
    ``state_dict_ema``), or a bare one; without the names that DDP, FSDP and torch.compile add.

    Raises:
        InputError: there is none, or no averaged one where ``ema`` asks for it.
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
        raise InputError(f"{source}: holds no weights: {_sample(payload)}")
    return _unwrap(state)


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without what wrappers put into them, in any nesting.

    torch.compile's, FSDP's and activation checkpointing's names are theirs alone, and go wherever they stand. DDP's
    ``module.`` goes from the front, and only where all keys begin with it: a network may have a child of that name.
    """
    private = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
    state = {private.sub("", key): value for key, value in state.items()}
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load_weights(model: nn.Module, path: str | Path, *, ema: bool = False, new_head: bool = False) -> None:
    """Put the weights of a file into a model, completely or not at all.

    Takes a released LIP checkpoint, the reference's training checkpoint, our own (a run folder or a file), timm's or
    torchvision's; ``.pth``, ``.pt`` or ``.safetensors``.

    Args:
        model: a timm model; its ``checkpoint_filter_fn`` maps released keys to its own.
        ema: take the averaged weights.
        new_head: leave the file's classifier out and keep the model's (fine-tuning on other classes).

    Raises:
        InputError: no such file, no checkpoint, or keys and shapes that are not the model's (all counted).
    """
    path = resolve(path)
    put_weights(model, load(path), str(path), ema=ema, new_head=new_head)


def put_weights(
    model: nn.Module, payload: dict[str, Any], path: str, *, ema: bool = False, new_head: bool = False
) -> None:
    """``load_weights`` of a file that is read already; ``path`` names it in errors."""
    state = extract_weights(payload, path, ema)
    rename = getattr(model, "checkpoint_filter_fn", None)
    if rename is not None:
        state = rename(state, model)
    wanted = model.state_dict()
    if new_head:
        heads = model.default_cfg["classifier"]
        heads = (heads,) if isinstance(heads, str) else heads
        for key in [key for key in wanted if key.rpartition(".")[0] in heads]:
            state[key] = wanted[key]
    problems = []
    for label, keys in (
        ("missing", [key for key in wanted if key not in state]),
        ("unknown", [key for key in state if key not in wanted]),
        ("of another shape", [key for key in wanted if key in state and state[key].shape != wanted[key].shape]),
        ("complex", [key for key in wanted if key in state and state[key].is_complex()]),  # torch drops half of each
    ):
        if keys:
            problems.append(f"{len(keys)} keys {label} ({_sample(keys)})")
    if problems:
        hint = ""
        if not new_head and all("of another shape" in problem for problem in problems):
            hint = "; for another number of classes set model.new_head: true"
        raise InputError(f"{path}: not the weights of this {type(model).__name__}: {'; '.join(problems)}{hint}")
    model.load_state_dict(state)


def _sample(keys: Any) -> str:
    keys = [str(key) for key in keys]
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
