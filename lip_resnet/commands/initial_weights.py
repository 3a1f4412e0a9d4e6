"""The weights that a run starts from (``model.weights``), and the record of where they come from."""

import contextlib
from typing import Any

from torch import nn

from lip_resnet import checkpoint, distributed
from lip_resnet.config import DataConfig, DetectionDataConfig, InputError, ModelConfig
from lip_resnet.evaluation.compatibility import check_class_names, check_normalization, recorded_classes
from lip_resnet.evaluation.protocol import describe_training
from lip_resnet.files import sha256
from lip_resnet.models.description import recorded_network
from lip_resnet.models.registry import build_model, check_pretrained_name, create_pretrained
from lip_resnet.models.weights import choose_weights, extract_weights, hash_weights, put_weights
from lip_resnet.recipe import task_of

TIMM = "timm:"
"""Before a name in ``model.weights`` that is timm's, such as timm:resnet50.a1_in1k, and not a path."""


def load_initial_weights(
    model: nn.Module,
    config: ModelConfig,
    data: DataConfig | DetectionDataConfig | None = None,
    classes: list[str] | None = None,
) -> dict[str, Any]:
    """Load ``config.weights``, a checkpoint file, a run folder or ``timm:NAME``, into a model.

    Args:
        data, classes: the data to train on and the names of their classes, to compare with those of the file's
            training; None: not compared.

    Returns:
        ``Provenance.initial_weights``.

    Raises:
        InputError: no such file or name, not weights of this model, or those of other classes or another normalisation.
    """
    source, payload, digest = distributed.on_main(lambda: _read(config, data))
    if (task := task_of(payload.get("config"))) != "classification":
        raise InputError(
            f"{source} is of task: {checkpoint.printable(task)}; a network starts from the weights of a classification"
        )
    # A file without a recipe does not say that its network had other layers than `downsampling`.
    converts = config.convert or recorded_network(payload, source) is None
    try:
        if not (converts and config.downsampling and put_converted(model, config, payload, source)):
            put_weights(model, payload, source, new_head=config.new_head, convert=config.convert)
    except InputError as error:
        theirs = source.removeprefix(TIMM).partition(".")[0]
        if theirs == config.name or not source.startswith(TIMM):
            raise
        hint = f"these are weights of model.name: {theirs}"
        if config.name.startswith("lip_"):
            hint += ", into which model.downsampling: {main: lip, shortcut: lip} puts LIP"
        raise InputError(f"{error}; {hint}") from error
    recipe, training = None, None
    with contextlib.suppress(InputError):  # not a recipe of this version: the weights' digest identifies them
        recipe = checkpoint.read_recipe(payload, source)
    if not config.new_head:
        check_class_names(recorded_classes(payload), classes, source, "for other classes set model.new_head: true")
    if data is not None and not config.convert and (not config.new_head or isinstance(data, DetectionDataConfig)):
        check_normalization(recipe, data, source, "to train on with another set model.convert: true")
    processes = payload.get("processes") or []
    counted = isinstance(processes, list) and all(type(n) is int and n > 0 for n in processes)
    if recipe is not None and processes and counted:
        training = describe_training(recipe, processes, payload.get("initial_weights"), payload.get("datasets"))
        training["step"] = payload.get("step")
    content, kind = hash_weights(extract_weights(payload, source)), choose_weights(payload, source, None)
    return {"training": training, "sha256": digest, "content": content, "weights": kind}


def _read(config: ModelConfig, data: DataConfig | DetectionDataConfig | None) -> tuple[str, dict[str, Any], str | None]:
    """``config.weights``: its name in errors, the checkpoint, and the file's sha256 (None of timm's).

    Raises:
        InputError: no such file or name; or timm's weights were trained with another normalisation than ``data``'s.
    """
    assert config.weights is not None
    if not config.weights.startswith(TIMM):
        path = checkpoint.resolve(config.weights)
        if not path.exists():
            key = "model.backbone.weights" if isinstance(data, DetectionDataConfig) else "model.weights"
            raise InputError(
                f"{key}: {path}: no such file; scripts/fetch_released.py DIR downloads the authors' weights"
            )
        return str(path), checkpoint.load(path), sha256(path)
    name = config.weights.removeprefix(TIMM).strip()
    check_pretrained_name(name)
    network: Any = create_pretrained(name)
    for key in () if data is None or config.convert else ("mean", "std"):
        theirs, ours = tuple(network.pretrained_cfg[key]), getattr(data, key)
        if theirs != ours:
            raise InputError(
                f"{config.weights} was trained with data.{key}={list(theirs)}, here it is {list(ours)}; set data.{key} "
                "to that, or to train on with another set model.convert: true"
            )
    return config.weights, dict(network.state_dict()), None


def put_converted(model: nn.Module, config: ModelConfig, payload: dict[str, Any], source: str) -> bool:
    """Load weights of the network without ``config.downsampling``; what its layers add keeps its initial weights.

    Returns:
        Whether it was done: not where the layers add no weights, or the file holds some of theirs.

    Raises:
        InputError: not weights of that network.
    """
    plain, own = build_model(config.model_copy(update={"downsampling": {}})), model.state_dict()
    added = own.keys() - plain.state_dict().keys()
    if not added or added & extract_weights(payload, source, own=own.keys()).keys():
        return False
    put_weights(plain, payload, source, new_head=config.new_head, convert=True)
    loaded = {key: value for key, value in plain.state_dict().items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(own | loaded)
    return True
