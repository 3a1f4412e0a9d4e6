"""Which pixels of a photograph count: the importance of all sites as one map, Grad-CAM, and the strength of edges."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lip_resnet.errors import InputError
from lip_resnet.insight.importance import SiteMaps, importance_maps

BY_CONTENT = ("lip", "softpool", "detail_preserving", "max")
"""Layers whose weights depend on the features."""
SMALLEST_MAP = 4
"""Grad-CAM reads the last stage whose map has at least this many positions a side."""
_LUMINANCE = (0.299, 0.587, 0.114)


def pixel_importance(maps: Sequence[SiteMaps], size: Sequence[int]) -> NDArray[np.float32]:
    """The maps of a network's sites as one map of the pixels: the product of their relative weights, (B, H, W).

    A site's output is a weighted mean of its input. So a pixel's share in the output of a chain of sites is the product
    of the weights on its way, as far as the convolutions between them keep positions. Relative weights leave out how
    many windows contain a position: average pooling gives 1 everywhere. Sites that read maps of one size, such as a
    block's main path and its shortcut, are parallel; their mean is taken. Maps are resampled bilinearly.

    Args:
        maps: the mean over channels, as ``importance_maps`` returns by default.
        size: (H, W) of the photographs.
    """
    by_size: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}
    for each in maps:
        weight = np.nan_to_num(each.relative_weight)
        by_size.setdefault(weight.shape[-2:], []).append(weight)
    product = np.ones((), dtype=np.float32)
    for parallel in by_size.values():
        mean = torch.from_numpy(np.mean(parallel, axis=0))
        product = product * F.interpolate(mean, tuple(size), mode="bilinear", align_corners=False)[:, 0].numpy()
    return product


def content_maps(model: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[SiteMaps]:
    """``importance_maps`` of the sites whose weights depend on the features.

    Raises:
        InputError: the network has none, or ``images`` are not uint8 photographs.
    """
    maps = importance_maps(model, images, mean=mean, std=std)
    if kept := [each for each in maps if each.layer in BY_CONTENT]:
        return kept
    present = ", ".join(sorted({each.layer for each in maps}))
    raise InputError(
        f"{type(model).__name__} has no layer that weighs by content ({', '.join(BY_CONTENT)}); it has {present}"
    )


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
    handles = [
        model.get_submodule(info["module"]).register_forward_hook(
            lambda layer, inputs, out, name=info["module"]: sides.update({name: min(out.shape[-2:])})
        )
        for info in model.feature_info
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    large = [name for name, side in sides.items() if side >= SMALLEST_MAP]
    return model.get_submodule((large or list(sides))[-1])
