"""Which pixels of a photograph count: the importance of all sites as one map, Grad-CAM, and the strength of edges."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lip_resnet.errors import InputError
from lip_resnet.insight.importance import choose_sites, layer_name, visit_sites, window_of
from lip_resnet.insight.weights import sum_over_windows, window_weights
from lip_resnet.layers.window import Window

BY_CONTENT = ("lip", "softpool", "detail_preserving", "max")
"""Layers whose weights depend on the features."""
SMALLEST_MAP = 4
"""Grad-CAM reads the last stage whose map has at least this many positions a side."""
_LUMINANCE = (0.299, 0.587, 0.114)


class SiteWeights(NamedTuple):
    """The weights of one layer for a batch."""

    name: str
    """Of the module."""
    window: Window
    size: tuple[int, int]
    """(H, W) of its input."""
    weights: Tensor
    """(B, 1, h, w, k * k): the weights of every window, the mean over channels."""


def site_weights(model: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[SiteWeights]:
    """The weights of all sites that weigh by content, for uint8 photographs (B, 3, H, W).

    Raises:
        InputError: the network has no such site, or ``images`` are not uint8 photographs.
    """
    present = choose_sites(model, None)
    chosen = {name: layer for name, layer in present.items() if layer_name(layer) in BY_CONTENT}
    if not chosen:
        kinds = ", ".join(sorted({layer_name(layer) for layer in present.values()}))
        raise InputError(
            f"{type(model).__name__} has no layer that weighs by content ({', '.join(BY_CONTENT)}); it has {kinds}"
        )
    sites: list[SiteWeights] = []

    def visit(name: str, layer: nn.Module, features: Tensor, logits: Tensor) -> None:
        window = window_of(layer)
        weights = window_weights(layer_name(layer), logits, window).mean(1, keepdim=True)
        sites.append(SiteWeights(name, window, (logits.shape[2], logits.shape[3]), weights))

    visit_sites(model, images, chosen, visit, mean, std)
    return sites


def pixel_importance(sites: Sequence[SiteWeights], size: Sequence[int]) -> NDArray[np.float32]:
    """The weight of every pixel in the network's last average, over its weight if all sites averaged: (B, H, W).

    A site's output is a weighted mean of its input. So the weight of a position in a chain of sites is the sum, over
    the windows that contain it, of its weight there times the weight of the window further on: the weights are rolled
    out from the last site, whose windows count the same, to the first. Convolutions between sites are taken to keep
    positions. Sites with inputs of one size, as in a block's main path and its shortcut, are parallel: their mean is
    taken. The map is 1 everywhere where all sites average, and resampled bilinearly to the pixels.

    Args:
        size: (H, W) of the photographs.

    Source: attention rollout, Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, with windows
    in the place of attention.
    """
    by_size: dict[tuple[int, int], list[SiteWeights]] = {}
    for site in sites:
        by_size.setdefault(site.size, []).append(site)
    first = sites[0].weights
    own, equal = first.new_ones(len(first), 1, 1, 1), first.new_ones(1, 1, 1, 1)
    for level in sorted(by_size):
        own = torch.stack([_spread(site, site.weights, own) for site in by_size[level]]).mean(0)
        equal = torch.stack([_spread(site, _equal_weights(site), equal) for site in by_size[level]]).mean(0)
    relative = (own / equal).nan_to_num()  # 0 / 0 where no window reaches
    return F.interpolate(relative, tuple(size), mode="bilinear", align_corners=False)[:, 0].cpu().numpy()


def _spread(site: SiteWeights, weights: Tensor, outputs: Tensor) -> Tensor:
    """The weights of a site's outputs (B, 1, h', w') -> those of its inputs (B, 1, H, W)."""
    h, w = weights.shape[2:4]
    if outputs.shape[-2:] != (h, w):  # something other than a site downsamples in between
        outputs = F.interpolate(outputs, (h, w), mode="bilinear", align_corners=False)
    return sum_over_windows(weights * outputs[..., None], site.size, site.window)


def _equal_weights(site: SiteWeights) -> Tensor:
    return window_weights("average", site.weights.new_zeros(1, 1, *site.size), site.window)


def edge_strength(images: Tensor) -> NDArray[np.float32]:
    """(B, 3, H, W) uint8 -> (B, H, W): the length of Sobel's gradient of the luminance; borders are repeated."""
    weights = torch.tensor(_LUMINANCE, device=images.device).view(3, 1, 1)
    luminance = F.pad((images.float() * weights).sum(1, keepdim=True), [1] * 4, mode="replicate")
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device)
    gradient = F.conv2d(luminance, torch.stack([kernel, kernel.T])[:, None])
    return gradient.square().sum(1).sqrt().cpu().numpy()


def has_captum() -> bool:
    """Whether the package captum, which computes Grad-CAM, can be imported."""
    try:
        import captum.attr  # noqa: F401
    except ImportError:
        return False
    return True


def grad_cam(model: nn.Module, inputs: Tensor, classes: Tensor) -> NDArray[np.float32]:
    """Grad-CAM of one class an image, by captum: (B, H, W), at least 0, resampled bilinearly.

    It reads the last of timm's ``feature_info`` stages whose map is at least ``SMALLEST_MAP`` a side: in a small
    photograph the last stage has one or four positions, which cannot localise.

    Args:
        inputs: (B, 3, H, W), normalised.
        classes: (B,) int64.

    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", ICCV 2017.
    """
    from captum.attr import LayerGradCam

    method = LayerGradCam(model, _last_stage(model, inputs[:1]))
    with torch.enable_grad():
        maps = method.attribute(inputs, target=classes, relu_attributions=True)
    resampled = F.interpolate(maps.detach().float(), inputs.shape[-2:], mode="bilinear", align_corners=False)
    return resampled[:, 0].cpu().numpy()


@torch.no_grad()
def _last_stage(model: nn.Module, inputs: Tensor) -> nn.Module:
    sides: dict[str, int] = {}
    stages: Any = model.feature_info
    handles = [
        model.get_submodule(info["module"]).register_forward_hook(
            lambda layer, inputs, out, name=info["module"]: sides.update({name: min(out.shape[-2:])})
        )
        for info in stages
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    large = [name for name, side in sides.items() if side >= SMALLEST_MAP]
    return model.get_submodule((large or list(sides))[-1])
