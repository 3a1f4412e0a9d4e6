"""The importance that layers of local weights give to the positions of a photograph.

A layer that is the mean of its window weighted by exp(logit) has three maps: the importance exp(logit) of every
position, the weight that every position gets in all windows that contain it, and the entropy of every window's weights.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lip_resnet.errors import InputError
from lip_resnet.layers.pooling import DetailPreserving, LIP2d, SoftPool
from lip_resnet.layers.window import Window

WEIGHTED = (LIP2d, SoftPool, DetailPreserving, nn.AvgPool2d, nn.MaxPool2d)
"""Layers whose windows have weights: of average pooling they are equal, of max pooling one is 1."""


@dataclass(frozen=True)
class SiteMaps:
    """The maps of one layer for a batch of B photographs; C is 1 (the mean over channels) or the channels asked for."""

    name: str
    """Of the module."""
    window: Window
    importance: NDArray[np.float32]
    """(B, C, H, W): exp(logit) of every position, divided by the map's largest value, so that it lies in (0, 1]."""
    weight: NDArray[np.float32]
    """(B, C, H, W): the sum of a position's weights in all windows that contain it. Each window's weights sum to 1."""
    entropy: NDArray[np.float32]
    """(B, C, h, w): of each window's weights, divided by that of equal weights: 1 for average pooling, 0 for max."""
    logit_mean: float
    logit_std: float
    """Of all logits of the batch, all channels; NaN for max pooling, which has none."""


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    """Module name -> layer, of the layers of local weights that downsample, in the order of the network's modules.

    Without pooling layers whose windows are not square, are dilated, or reach beyond the padding (``ceil_mode``).
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WEIGHTED) and _is_plain(module) and _window(module).stride > 1
    }


@torch.no_grad()
def importance_maps(
    model: nn.Module,
    images: Tensor,
    *,
    sites: Sequence[str] | None = None,
    channels: Sequence[int] | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> list[SiteMaps]:
    """Run a network on photographs and return the maps of its sites, in the order of ``sites_of``.

    The network's mode is restored and no hook stays. Logits are computed as in the network's own forward, under
    autocast too; the maps are computed in float32. Sites that the forward does not call have no maps.

    Args:
        model: any network with layers of ``WEIGHTED``, with or without a classifier, or timm's ``features_only``.
        images: (B, 3, H, W) uint8 photographs of any size that the network accepts, on any device.
        sites: names out of ``sites_of``; None for all.
        channels: channels to keep; None for the mean over all channels.
        mean, std: (3,), of pixels in [0, 1].

    Raises:
        InputError: the network has no such layer or no such site, or ``images`` are not uint8 photographs.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise InputError(f"images are {tuple(images.shape)} {images.dtype}; they must be (B, 3, H, W) torch.uint8")
    present = sites_of(model)
    if not present:
        kinds = sorted({type(module).__name__ for module in model.modules() if _strides(module)})
        raise InputError(
            f"{type(model).__name__} has no layer of local weights (LIP, softpool, detail_preserving, average, max); "
            f"it downsamples by {', '.join(kinds) or 'nothing'}"
        )
    if unknown := [name for name in sites or () if name not in present]:
        raise InputError(f"no site {unknown[0]!r}; this network has {', '.join(present)}")
    wanted = {name: module for name, module in present.items() if sites is None or name in sites}
    device = next(model.parameters()).device
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    inputs = (images.to(device).float() / 255 - torch.tensor(mean, device=device).view(3, 1, 1)) / scale
    was_training = model.training
    model.eval()
    try:
        with _recorded(wanted) as logits:
            model(inputs)
    finally:
        model.train(was_training)
    return [_maps(name, layer, logits[name], channels) for name, layer in wanted.items() if name in logits]


@contextlib.contextmanager
def _recorded(sites: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record every site's logits (B, C, H, W) in a forward pass; for max pooling, its input."""
    logits: dict[str, Tensor] = {}
    handles = []
    for name, module in sites.items():

        def record(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            logits[name] = out if layer is not sites[name] else _logits_of(layer, inputs[0])

        source = module.logits if isinstance(module, LIP2d) else module
        handles.append(source.register_forward_hook(record))
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def _logits_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The logits by which a layer without a logit module weighs its input (B, C, H, W)."""
    if isinstance(layer, DetailPreserving):
        return layer.compute_logits(x)
    return torch.zeros_like(x) if isinstance(layer, nn.AvgPool2d) else x


def _maps(name: str, layer: nn.Module, logits: Tensor, channels: Sequence[int] | None) -> SiteMaps:
    """The maps of one site from its logits (B, C, H, W)."""
    window, logits = _window(layer), logits.float()
    if channels is not None and not set(channels) <= set(range(logits.shape[1])):
        raise InputError(f"{name}: channels {list(channels)}; it has 0 to {logits.shape[1] - 1}")
    logit_mean, logit_std = logits.mean().item(), logits.std().item()
    if isinstance(layer, nn.MaxPool2d):
        logit_mean = logit_std = math.nan
    if channels is not None:
        logits = logits[:, list(channels)]
    weights = _window_weights(logits, window, hard=isinstance(layer, nn.MaxPool2d))
    largest = logits.amax((2, 3), keepdim=True)
    importance = torch.exp(logits - largest)
    weight = _sum_over_windows(weights, logits.shape[-2:], window)
    entropy = _entropy(weights, logits.shape[-2:], window)
    if channels is None:
        importance, weight, entropy = (each.mean(1, keepdim=True) for each in (importance, weight, entropy))
    importance, weight, entropy = (each.cpu() for each in (importance, weight, entropy))
    return SiteMaps(name, window, importance.numpy(), weight.numpy(), entropy.numpy(), logit_mean, logit_std)


def _window_weights(logits: Tensor, window: Window, hard: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w, k * k): weights of every window, 0 in the padding; ``hard``: 1 at the largest."""
    padded = F.pad(logits, [window.padding] * 4, value=-torch.inf)
    values = padded.unfold(2, window.kernel_size, window.stride).unfold(3, window.kernel_size, window.stride).flatten(4)
    if hard:
        return F.one_hot(values.argmax(-1), values.shape[-1]).to(values.dtype)
    return values.softmax(-1)


def _sum_over_windows(weights: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """(B, C, h, w, k * k) -> (B, C, H, W): the weights of a position, added over its windows."""
    batch, channels, h, w, positions = weights.shape
    columns = weights.reshape(batch * channels, h * w, positions).transpose(1, 2)
    folded = F.fold(columns, tuple(size), window.kernel_size, padding=window.padding, stride=window.stride)
    return folded.reshape(batch, channels, *size)


def _entropy(weights: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """(B, C, h, w, k * k) -> (B, C, h, w): entropy over that of equal weights on the window's real positions."""
    real = F.pad(torch.ones(1, 1, *size, device=weights.device), [window.padding] * 4)
    count = real.unfold(2, window.kernel_size, window.stride).unfold(3, window.kernel_size, window.stride).sum((-1, -2))
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return torch.where(count > 1, entropy / count.clamp(min=2).log(), torch.ones_like(entropy))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer's windows are square, without dilation, and inside the padded map."""
    values: list[Any] = [getattr(layer, name, 1) for name in ("kernel_size", "stride", "padding", "dilation")]
    square = all(isinstance(value, int) or len(set(value)) == 1 for value in values)
    return square and values[3] in (1, (1, 1)) and not getattr(layer, "ceil_mode", False)


def _window(layer: nn.Module) -> Window:
    if isinstance(layer, SoftPool | DetailPreserving):
        return layer.window
    values: list[Any] = [getattr(layer, name) for name in ("kernel_size", "stride", "padding")]
    size, stride, padding = (value if isinstance(value, int) else value[0] for value in values)
    return Window(size, stride, padding)


def _strides(module: nn.Module) -> bool:
    stride = getattr(module, "stride", 1)
    return max(stride if isinstance(stride, tuple) else (stride,)) > 1
