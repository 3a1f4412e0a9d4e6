"""Accuracy by the reference's protocol, compared with published counts."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_resnet import distributed
from lip_resnet.config import Config, EvalDataConfig, InputError, ModelConfig
from lip_resnet.data import EvalLoader
from lip_resnet.evaluation import results, testsets
from lip_resnet.evaluation.evaluate import evaluate_set
from lip_resnet.evaluation.protocol import EvalConfig, adapt
from lip_resnet.recipe import load_config


def reference_protocol(model: str, num_classes: int, trained: Config | None = None) -> EvalConfig:
    """The reference's evaluation: PIL bilinear resize to 256, centre crop of 224, float32, contiguous tensors.

    Args:
        trained: the recipe of a run of ours, whose kind of data it is; None: class folders or shards.
    """
    keys = ("name", "root", "label_column", "classes")
    source = {key: getattr(trained.data, key) for key in keys} if trained else {"root": "."}
    network = ModelConfig(name=model, num_classes=num_classes)
    return EvalConfig(model=network, data=EvalDataConfig(**source), channels_last=False)


def evaluate_reference(
    model: nn.Module, config: EvalConfig, data: str, workers: int, images: int | None = None, kind: str | None = None
) -> dict[str, Any]:
    """Exact counts by the reference's protocol, on any number of processes.

    Args:
        config: ``reference_protocol``'s.
        data, kind: as ``protocol.adapt``'s: every kind of data that eval.py takes.
        workers: loader processes of each process.
        images: how many there must be, None for any number.

    Raises:
        InputError: the data does not fit the network, or is not as many images.
    """
    config, split = adapt(config, None, data, kind=kind, workers=workers)
    val = testsets.open_set(None, config.data, split, config.model.num_classes)
    if images is not None and len(val.source) != images:
        raise InputError(f"--data {data} has {len(val.source)} images; the published counts are of {images}")
    # TF32 rounds to 10 bits: counts would not be the float32 counts.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model.to(distributed.device())
    return evaluate_set(model, val, EvalLoader(val.source, config.data), config)


def protocol_difference(row: dict[str, Any], recipe: Path) -> str | None:
    """The first thing in which a row of eval.py is not the paper's experiment on 8 processes, or None.

    Of a row whose training is unknown only the evaluation is compared.
    """
    trained = row["protocol"].get("training") is not None
    config = load_config(recipe)
    training = results.describe_training(config, [8]) if trained else None
    return results.difference(row["protocol"], results.describe_protocol(EvalConfig.from_recipe(config), training))
