"""Weights out of a checkpoint of any origin, and into a model: all of them or none."""

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lip_resnet.checkpoint import describe_entries, load, printable, resolve
from lip_resnet.config import InputError, Recipe
from lip_resnet.models.description import check_network

_PLAIN = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "params")
_AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema")
"""Entries of a checkpoint that hold the weights and their average: ours; torchvision's, DeiT's and MAE's; timm's and
Lightning's; those of PyTorch's tutorials, of pycls, and of common training scripts."""

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Names that torch.compile, FSDP, activation checkpointing and Lightning insert into keys; no network's own."""
_COUNTER = "num_batches_tracked"


def choose_weights(payload: dict[str, Any], source: str, asked: str | None, trained: Recipe | None = None) -> str:
    """Which weights of a checkpoint are meant: "model", or "ema", the averaged ones.

    Args:
        asked: one of the two, such as ``--weights``; None: what ``train.rules`` of the recipe ``trained`` says, and
            without a recipe the plain ones, unless the checkpoint holds only averaged ones.

    Raises:
        InputError: "model", and it holds only averaged ones.
    """
    asked = asked or (trained.train.rules if trained is not None else None)
    only_averaged = not _entries(payload, _PLAIN) and bool(_entries(payload, _AVERAGED))
    if asked == "model" and only_averaged:
        raise InputError(f"{source}: holds only averaged (EMA) weights: --weights ema")
    return asked or ("ema" if only_averaged else "model")


def _entries(payload: dict[str, Any], names: Iterable[str]) -> dict[str, dict]:
    return {name: payload[name] for name in names if isinstance(payload.get(name), dict)}


def extract_weights(
    payload: dict[str, Any], source: str, ema: bool = False, own: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the names that wrappers add to its keys.

    Args:
        payload: a state dict, or a checkpoint that holds one under a name of ``_PLAIN`` or ``_AVERAGED``.
        source: the checkpoint's name in errors.
        ema: return the averaged (EMA) weights. Without, they are returned where the checkpoint holds no others.
        own: the keys of the network, which tell a wrapper's name from that of a child.

    Raises:
        InputError: there are no weights, or no averaged ones with ``ema``.
    """
    is_bare = bool(payload) and all(isinstance(value, Tensor) for value in payload.values())
    entries = _entries(payload, _AVERAGED) if ema else _entries(payload, (*_PLAIN, *_AVERAGED))
    if ema and not entries:
        raise InputError(f"{source}: holds no averaged (EMA) weights; it holds {describe_entries(payload)}")
    state = payload if is_bare else next(iter(entries.values()), None)
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise InputError(f"{source}: holds no weights; it holds {describe_entries(payload)}")
    return _without_wrappers(_with_counters(state), source, own)


def hash_weights(state: dict[str, Tensor]) -> str:
    """Digest of names and tensors, the same for every file that holds them."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"


def _with_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with batch norm's ``num_batches_tracked`` where strict loading in torch does not require it.

    Files from before PyTorch 0.4.1 lack it, and plain dictionaries of tensors do not say which version wrote them.
    """
    versions = getattr(state, "_metadata", None)
    complete = dict(state)
    for key in state:
        module, _, entry = key.rpartition(".")
        described = versions.get(module) if isinstance(versions, dict) else None
        version = described.get("version") if isinstance(described, dict) else None
        if entry == "running_var" and (not isinstance(version, int) or version < 2):
            complete.setdefault(f"{module}.{_COUNTER}".lstrip("."), torch.tensor(0))
    return complete


def _without_wrappers(state: dict[str, Tensor], source: str, own: Collection[str] | None) -> dict[str, Tensor]:
    """The state dict without the names of wrappers in its keys, in any nesting, and without AveragedModel's counter.

    Names of ``_WRAPPERS``, and DDP's ``module``, are removed wherever they occur, unless the network has a child of
    that name; then any one name that is before all keys (``module.``, Lightning's ``model.``), as long as no key fits.
    Where the network is not known, ``module`` is removed only before all keys, as are ``model`` and ``net``.

    Raises:
        InputError: two keys differ only in such names.
    """
    children = {part for key in own or () for part in key.split(".")}
    wrappers = (_WRAPPERS | (set() if own is None else {"module"})) - children
    averaged = {"n_averaged"} - children
    keys = {key: [part for part in key.split(".") if part not in wrappers] for key in state}
    keys = {key: parts for key, parts in keys.items() if parts[-1:] != [*averaged]}
    while own is None or not any(".".join(parts) in own for parts in keys.values()):
        first = {parts[0] for parts in keys.values() if len(parts) > 1}
        one_name = len(first) == 1 and all(len(parts) > 1 for parts in keys.values())
        if not one_name or (own is None and not first <= {"module", "model", "net"}):
            break
        keys = {key: parts[1:] for key, parts in keys.items()}
    stripped = {".".join(parts): state[key] for key, parts in keys.items()}
    if len(stripped) < len(keys):
        raise InputError(f"{source}: holds two tensors of one name; it holds {describe_entries(state)}")
    return stripped


def load_weights(
    model: nn.Module, path: str | Path, *, ema: bool = False, new_head: bool = False, convert: bool = False
) -> None:
    """Load the weights of a file into a model, completely or not at all.

    Args:
        model: a timm model; its ``checkpoint_filter_fn``, if any, maps released keys to its own.
        path: a released LIP checkpoint, the reference's training checkpoint, ours (a run folder or a file), timm's,
            torchvision's, DeiT's or Lightning's; of torch.save or safetensors, whatever its name.
        ema: load the averaged (EMA) weights.
        new_head: keep the model's classifier instead of the file's (fine-tuning on other classes).
        convert: accept a network that computes otherwise with the same weights, such as one with other pooling.

    Raises:
        InputError: the file is missing or no checkpoint; its keys or shapes are not the model's (all are counted); or
            it has a recipe, and the model is another network than the recipe's.
    """
    path = resolve(path)
    put_weights(model, load(path), str(path), ema=ema, new_head=new_head, convert=convert)


def put_weights(
    model: nn.Module,
    payload: dict[str, Any],
    path: str,
    *,
    ema: bool = False,
    new_head: bool = False,
    convert: bool = False,
) -> None:
    """As ``load_weights``, from a checkpoint that has been read; ``path`` is its name in errors.

    Raises:
        InputError: there are no weights, their keys or shapes are not the model's, or it is another network.
    """
    expected = model.state_dict()
    state = extract_weights(payload, path, ema, expected.keys())
    rename = getattr(model, "checkpoint_filter_fn", None)
    if rename is not None:
        state = rename(state, model)
    # A frozen batch norm has no counter.
    state = {key: value for key, value in state.items() if key in expected or key.rpartition(".")[2] != _COUNTER}
    heads: tuple[str, ...] = ()
    if new_head:
        cfg: Any = model.default_cfg
        heads = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else tuple(cfg["classifier"])
        state |= {key: value for key, value in expected.items() if key.rpartition(".")[0] in heads}
    problems = []
    for label, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unknown", [key for key in state if key not in expected]),
        ("of another shape", [key for key in expected if key in state and state[key].shape != expected[key].shape]),
        # load_state_dict would discard the imaginary parts
        ("complex", [key for key in expected if key in state and state[key].is_complex()]),
        (
            "sparse or without data",
            [key for key, own in expected.items() if key in state and not own.is_meta and not _is_dense(state[key])],
        ),
    ):
        if keys:
            problems.append(f"{len(keys)} keys {label} ({_sample(keys)})")
    if problems:
        hint = ""
        if not new_head and all("of another shape" in problem for problem in problems):
            hint = "; for another number of classes set model.new_head: true"
        raise InputError(f"{path}: not the weights of this {type(model).__name__}: {'; '.join(problems)}{hint}")
    if not convert:
        check_network(model, payload, path, heads)
    model.load_state_dict(state)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta


def _sample(keys: Iterable[Any]) -> str:
    names = [printable(key) for key in keys]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
