"""What a training run shows of its layers of local weights after every evaluation."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lip_resnet.errors import InputError
from lip_resnet.insight.importance import SiteMaps, choose_sites, importance_maps

Observed = tuple[dict[str, float], dict[str, NDArray[np.uint8]]]
"""Tag -> number, and tag -> picture (H, W, 3)."""


def build_monitor(
    model: nn.Module, images: Sequence[tuple[str, Tensor]], mean: Sequence[float], std: Sequence[float]
) -> Callable[[nn.Module], Observed]:
    """What observes a network: ``lip/{entropy,logit_mean,logit_std}/SITE`` over all images, and a picture of each.

    One image at a time, so that the memory does not grow with their number. It changes neither the network nor the
    state of random numbers.

    Args:
        model: the network that will be trained.
        images: (name, (3, H, W) uint8), all of one size.
        mean, std: (3,), of pixels in [0, 1].

    Raises:
        InputError: the network has no layer of local weights, or matplotlib is not installed.
    """
    try:
        from lip_resnet.insight import figures
    except ImportError as error:
        raise InputError('train.log_images needs the package matplotlib: pip install "lip-resnet[insight]"') from error
    choose_sites(model, None)

    def observe(network: nn.Module) -> Observed:
        pictures: dict[str, NDArray[np.uint8]] = {}
        maps_of_images = []
        for name, pixels in images:
            maps = importance_maps(network, pixels[None], mean=mean, std=std)
            maps_of_images.append(maps)
            with figures.style():
                figure = figures.draw_maps(pixels.permute(1, 2, 0).numpy(), maps, 0, name, "")
                pictures[f"lip/maps/{len(pictures)}"] = figures.to_pixels(figure)
        return _statistics(maps_of_images), pictures

    return observe


def _statistics(maps_of_images: Sequence[Sequence[SiteMaps]]) -> dict[str, float]:
    """Tag -> number, over all images, which are equally large; without those that a layer does not have."""
    numbers: dict[str, float] = {}
    for of_site in zip(*maps_of_images, strict=True):
        means, deviations = (np.array([getattr(maps, key) for maps in of_site]) for key in ("logit_mean", "logit_std"))
        variance = np.mean(deviations**2) + np.var(means)
        numbers |= {
            f"lip/entropy/{of_site[0].name}": float(np.mean([maps.entropy.mean() for maps in of_site])),
            f"lip/logit_mean/{of_site[0].name}": float(means.mean()),
            f"lip/logit_std/{of_site[0].name}": float(np.sqrt(variance)),
        }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
