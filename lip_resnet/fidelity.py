"""Weights of the paper's networks: which network a file holds, and its accuracy by the reference's protocol."""

import hashlib
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from lip_resnet import distributed, results
from lip_resnet.config import Config, InputError
from lip_resnet.data import EvalLoader, build_sources, locate
from lip_resnet.engine import evaluate
from lip_resnet.models import registry
from lip_resnet.models.weights import extract_weights, put_weights
from lip_resnet.recipe import load_config, parse_config

NETWORKS = (
    *(
        (name, {} if width == 128 else {"bottleneck_width": width})
        for name, width in itertools.product(("lip_resnet50", "lip_resnet101", "lip_densenet121"), (128, 64, 256))
    ),
    *((name, {}) for name in ("resnet50", "resnet101", "densenet121")),
)
"""What a file of weights can be: (model, keywords)."""


class Network(NamedTuple):
    """What a file of weights turned out to hold."""

    model: str
    args: dict[str, Any]
    num_classes: int

    def build(self, trained: Config | None = None) -> nn.Module:
        """The network, with timm's description of it set to how it is evaluated.

        Args:
            trained: the recipe of a run of ours; None: the reference's protocol.
        """
        overlay = {}
        if not self.model.startswith("lip_"):  # timm describes weights of its own, which these are not
            nothing = ("tag", "url", "hf_hub_id", "origin_url", "license", "paper_ids", "test_input_size")
            overlay = dict.fromkeys((*nothing, "test_crop_pct"))
            overlay |= {"input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875}
            overlay |= {"interpolation": "bilinear"}
        if trained is not None:
            data = trained.data
            overlay |= {"input_size": (3, data.eval_size, data.eval_size), "pool_size": (-(-data.eval_size // 32),) * 2}
            overlay |= {"crop_pct": data.eval_size / data.eval_resize, "interpolation": data.interpolation}
            overlay |= {"mean": data.mean, "std": data.std}
        return registry.create_model(
            self.model, num_classes=self.num_classes, pretrained_cfg_overlay=overlay, **self.args
        )


def identify(payload: dict[str, Any], source: str, ema: bool = False) -> Network:
    """Name the network of a checkpoint from its keys and shapes alone; exactly one of ``NETWORKS`` fits.

    Args:
        ema: look at the averaged weights.

    Raises:
        InputError: none does; the message tells what is wrong with the nearest.
    """
    state = extract_weights(payload, source, ema)
    heads = [state[key] for key in ("fc.weight", "classifier.weight") if key in state and state[key].dim() == 2]
    num_classes = len(heads[0]) if heads else 1000
    nearest, fewest = None, None
    for name, args in NETWORKS:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=num_classes, **args)
        rename = getattr(model, "checkpoint_filter_fn", None)
        shapes = {(key, value.shape) for key, value in (rename(state, model) if rename else state).items()}
        apart = len(shapes ^ {(key, value.shape) for key, value in model.state_dict().items()})
        if not apart:
            return Network(name, args, num_classes)
        if fewest is None or apart < fewest:
            nearest, fewest = (name, args, model), apart
    name, args, model = nearest
    try:
        put_weights(model, payload, source, ema=ema)
    except InputError as error:
        raise InputError(f"{error}; the nearest network is {results.label(name, args)}") from None
    raise AssertionError("put_weights took what identify refused")


def check_finite(model: nn.Module, source: str) -> None:
    """Every number of a network is one.

    Raises:
        FloatingPointError: NaN or infinity, with the tensors that hold them.
    """
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{source}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}")


def sha256(path: Path) -> str:
    """Of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reference_config(network: Network, data: str, workers: int) -> tuple[Config, str]:
    """The reference's evaluation as a recipe, and the folder of images below its root.

    PIL bilinear resize to 256, centre crop of 224, float32, contiguous tensors.

    Args:
        data: the directory that holds val/, or that folder; class folders or shards.
    """
    place, split = locate(data)
    tree = {
        "model": {"name": network.model, "args": network.args, "num_classes": network.num_classes},
        "data": {**place, "batch_size": 256, "workers": workers},
        "optim": {"lr": 0.1},
        "train": {"epochs": 1, "channels_last": False},
    }
    return parse_config(tree, "the reference's protocol"), split


def evaluate_reference(model: nn.Module, network: Network, images: int | None, data: str, workers: int) -> dict:
    """Exact counts by the reference's protocol, on any number of processes.

    Args:
        images: how many there must be, None for any number.

    Raises:
        InputError: the data does not fit the network, or is not as many images.
    """
    config, split = reference_config(network, data, workers)
    source = build_sources(config.data, network.num_classes, (split,))[0]
    if images is not None and len(source) != images:
        raise InputError(f"--data {data} has {len(source)} images; the published counts are of {images}")
    # TF32 rounds to 10 bits: counts would not be the float32 counts.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model.to(distributed.device())
    return evaluate(model, EvalLoader(source, config.data), config)


def protocol_difference(row: dict[str, Any], recipe: Path) -> str | None:
    """The first thing in which a row of eval.py is not the paper's experiment on 8 processes, or None.

    Of a row whose training is unknown only the evaluation is compared.
    """
    trained = row["protocol"].get("training") is not None
    config = load_config(recipe)
    training = results.describe_training(config, [8]) if trained else None
    return results.difference(row["protocol"], results.describe_protocol(config, training))
