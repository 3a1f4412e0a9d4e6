"""Which of the paper's networks a checkpoint is of, by its keys and shapes, and that network built."""

import itertools
import math
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from lip_resnet.config import Config, InputError
from lip_resnet.models import registry
from lip_resnet.models.description import recorded_network
from lip_resnet.models.weights import extract_weights, put_weights

NETWORKS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(
        (name, {} if width == 128 else {"bottleneck_width": width})
        for name, width in itertools.product(("lip_resnet50", "lip_resnet101", "lip_densenet121"), (128, 64, 256))
    ),
    *((name, {}) for name in ("resnet50", "resnet101", "densenet121")),
)
"""The networks that ``identify`` knows: (model, keywords)."""


class Network(NamedTuple):
    """A network by its name in timm, keywords and number of classes."""

    model: str
    args: dict[str, Any]
    num_classes: int

    def __str__(self) -> str:
        keywords = ", ".join(f"{key}={value}" for key, value in self.args.items())
        return self.model + (f" ({keywords})" if keywords else "")

    def build(self, trained: Config | None = None) -> nn.Module:
        """The network, with its ``pretrained_cfg`` set to the evaluation protocol.

        Args:
            trained: the recipe of the run that trained it, whose network this is; None: the reference's protocol.

        Raises:
            InputError: see ``registry.build_model``.
        """
        overlay: dict[str, Any] = {}
        if not self.model.startswith("lip_"):  # timm's entry describes timm's weights, not these
            removed = ("tag", "url", "hf_hub_id", "origin_url", "license", "paper_ids", "test_input_size")
            overlay = dict.fromkeys((*removed, "test_crop_pct"))
            overlay |= {"input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875}
            overlay |= {"interpolation": "bilinear", "crop_mode": "center"}
        if trained is not None:
            data = trained.data
            overlay |= {"input_size": (3, data.eval_size, data.eval_size), "pool_size": (-(-data.eval_size // 32),) * 2}
            overlay |= {"crop_pct": crop_pct(data.eval_size, data.eval_resize), "crop_mode": data.crop_mode}
            overlay |= {"interpolation": data.interpolation, "mean": data.mean, "std": data.std}
            recipe = trained.model.model_copy(update={"num_classes": self.num_classes})
            return registry.build_model(recipe, pretrained_cfg_overlay=overlay)
        return registry.create_model(
            self.model, num_classes=self.num_classes, pretrained_cfg_overlay=overlay, **self.args
        )


def crop_pct(size: int, resize: int) -> float:
    """timm's ``crop_pct`` for a crop of ``size`` after a resize to ``resize`` pixels: floor(size / it) = resize."""
    fraction = size / resize
    return fraction if math.floor(size / fraction) == resize else math.nextafter(fraction, 0)


def identify(payload: dict[str, Any], source: str, ema: bool = False) -> Network:
    """The network of a checkpoint: its recipe's, or without a recipe the one of ``NETWORKS`` that its keys fit.

    Args:
        payload: the checkpoint, see ``extract_weights``.
        source: its name in errors.
        ema: identify the averaged (EMA) weights.

    Raises:
        InputError: no network fits; the message says how the nearest one differs.
    """
    recorded = recorded_network(payload, source)
    if recorded is not None:
        return Network(recorded.name, recorded.args, recorded.num_classes)
    state = extract_weights(payload, source, ema)
    heads = [state[key] for key in ("fc.weight", "classifier.weight") if key in state and state[key].dim() == 2]
    num_classes = len(heads[0]) if heads else 1000
    candidates = []
    for name, args in NETWORKS:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=num_classes, **args)
        rename = getattr(model, "checkpoint_filter_fn", None)
        shapes = {(key, value.shape) for key, value in (rename(state, model) if rename else state).items()}
        differences = len(shapes ^ {(key, value.shape) for key, value in model.state_dict().items()})
        network = Network(name, args, num_classes)
        if not differences:
            return network
        candidates.append((differences, network, model))
    _, network, model = min(candidates, key=lambda candidate: candidate[0])
    try:
        put_weights(model, payload, source, ema=ema)
    except InputError as error:
        raise InputError(f"{error}; the nearest network is {network}") from error
    raise AssertionError("put_weights accepted weights that identify did not")


def check_finite(model: nn.Module, source: str) -> None:
    """Check that no parameter or buffer of a network holds NaN or infinity, and no variance is negative.

    Raises:
        FloatingPointError: one does; the message says how many and names the first.
    """
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{source}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}")
    bad = [key for key, value in model.state_dict().items() if key.endswith("running_var") and (value < 0).any()]
    if bad:
        raise FloatingPointError(f"{source}: {len(bad)} variances have negative values, the first is {bad[0]}")
