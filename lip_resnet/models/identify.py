"""Which of the paper's networks a file of weights holds, told from its keys and shapes, and that network built."""

import itertools
import math
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from lip_resnet.config import Config, InputError
from lip_resnet.models import registry
from lip_resnet.models.weights import extract_weights, put_weights

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

    def __str__(self) -> str:
        keywords = ", ".join(f"{key}={value}" for key, value in self.args.items())
        return self.model + (f" ({keywords})" if keywords else "")

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
            overlay |= {"interpolation": "bilinear", "crop_mode": "center"}
        if trained is not None:
            data = trained.data
            overlay |= {"input_size": (3, data.eval_size, data.eval_size), "pool_size": (-(-data.eval_size // 32),) * 2}
            overlay |= {"crop_pct": crop_pct(data.eval_size, data.eval_resize), "crop_mode": data.crop_mode}
            overlay |= {"interpolation": data.interpolation, "mean": data.mean, "std": data.std}
        return registry.create_model(
            self.model, num_classes=self.num_classes, pretrained_cfg_overlay=overlay, **self.args
        )


def crop_pct(size: int, resize: int) -> float:
    """timm's fraction for a crop of ``size`` after a resize to ``resize``: floor(size / fraction) is ``resize``."""
    fraction = size / resize
    return fraction if math.floor(size / fraction) == resize else math.nextafter(fraction, 0)


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
        raise InputError(f"{error}; the nearest network is {Network(name, args, num_classes)}") from error
    raise AssertionError("put_weights took what identify refused")


def check_finite(model: nn.Module, source: str) -> None:
    """Every number of a network is one.

    Raises:
        FloatingPointError: NaN or infinity, with the tensors that hold them.
    """
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{source}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}")
