"""``lip_resnet.load_run``: a trained network with its classes and the preprocessing of its evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lip_resnet import checkpoint
from lip_resnet.config import Config, EvalDataConfig
from lip_resnet.data.decode import image_errors, to_rgb
from lip_resnet.data.transforms import eval_transform, normalize
from lip_resnet.evaluation.compatibility import recorded_classes
from lip_resnet.evaluation.protocol import EvalConfig, reference_protocol
from lip_resnet.evaluation.testsets import wnids
from lip_resnet.models.identify import identify
from lip_resnet.models.weights import choose_weights, put_weights


class Preprocessing:
    """PIL image of any mode and size -> (3, eval_size, eval_size) float32, the pixels that an evaluation reads.

    Resized, cropped and normalised as the recipe's ``data`` says. EXIF orientation is ignored, as in evaluations. It
    can be pickled, for the workers of a DataLoader.
    """

    def __init__(self, data: EvalDataConfig) -> None:
        self._transform = eval_transform(data)
        self._mean, self._std = torch.tensor(data.mean), torch.tensor(data.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """The network's input, without the batch's dimension.

        Raises:
            BadImage: its pixels have no known range, or it is too long and thin to be resized.
            TypeError: it is no PIL image.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"the transform takes a PIL image, not a {type(image).__name__}")
        name = str(getattr(image, "filename", "")) or "image"
        with image_errors(name, "load"):
            pixels = self._transform(to_rgb(image, name))
        return normalize(pixels[None], self._mean, self._std)[0]


@dataclass(frozen=True)
class LoadedRun:
    """A trained network and what is needed to use it."""

    model: nn.Module
    """In evaluation mode: images (B, 3, H, W), normalised -> logits (B, classes)."""
    classes: Sequence[str]
    """The name of each logit: of the classes trained on; of a released file, ImageNet's wnids; else numbers."""
    transform: Callable[[Image.Image], Tensor]
    """See ``Preprocessing``."""
    config: Config | EvalConfig
    """The recipe of the run; of a file without a recipe, the network and the reference's evaluation."""


def load_run(path: str | Path, *, weights: str | None = None, device: str | torch.device | None = None) -> LoadedRun:
    """Load a trained network with its classes and its preprocessing.

    Args:
        path: a run folder, a checkpoint of this project, an exported file, or one of the authors' released files.
        weights: "model", or "ema" for the averaged ones; None: what the recipe's ``train.rules`` says.
        device: of the model; None: the CPU.

    Raises:
        InputError: no such file, no checkpoint, damaged, or of no network that is known.
    """
    payload, source = checkpoint.load(checkpoint.resolve(path)), str(path)
    trained = checkpoint.read_recipe(payload, source)
    ema = choose_weights(payload, source, weights, trained) == "ema"
    network = identify(payload, source, ema)
    model = network.build(trained)
    put_weights(model, payload, source, ema=ema)
    config: Any = trained or _reference(network.model, network.args, network.num_classes)
    return LoadedRun(
        model.to(device).eval(), _classes(payload, network.num_classes), Preprocessing(config.data), config
    )


def _reference(model: str, args: dict[str, Any], num_classes: int) -> EvalConfig:
    config = reference_protocol(model, num_classes)
    return config.model_copy(update={"model": config.model.model_copy(update={"args": args})})


def _classes(payload: dict[str, Any], count: int) -> list[str]:
    names = recorded_classes(payload)
    if names is None and "config" not in payload and count == len(wnids()):
        names = wnids()
    return names if names is not None and len(names) == count else [str(label) for label in range(count)]
