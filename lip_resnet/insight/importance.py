"""The importance that layers of local weights give to the positions of a photograph.

A layer that is the mean of its window weighted by exp(logit) has three maps: the importance exp(logit) of every
position, the weight that every position gets in all windows that contain it, and the entropy of every window's weights.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import BlurPool2d
from torch import Tensor, nn

from lip_resnet.compat import is_compiled
from lip_resnet.errors import InputError
from lip_resnet.insight.weights import sum_over_windows, window_entropy, window_weights
from lip_resnet.layers.pooling import DetailPreserving, LIP2d, SoftPool, Strided
from lip_resnet.layers.window import Window

WEIGHTED: dict[type[Any], str] = {
    LIP2d: "lip",
    SoftPool: "softpool",
    DetailPreserving: "detail_preserving",
    nn.AvgPool2d: "average",
    nn.MaxPool2d: "max",
    Strided: "strided",
    BlurPool2d: "blur",
}
"""Layers whose windows have weights -> their names; ``weights.WEIGHINGS`` says which weights."""

Visit = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with a site's name, its layer, the features that it pools and the logits (B, C, H, W) of its weights."""


@dataclass(frozen=True)
class SiteMaps:
    """The maps of one layer for a batch of B photographs; C is 1 (the mean over channels) or the channels asked for."""

    name: str
    """Of the module."""
    window: Window
    importance: NDArray[np.float32]
    """(B, C, H, W): exp(logit) of every position, divided by its channel's largest value, so that it lies in [0, 1];
    NaN for strided and blur, which give a position no importance of its own."""
    weight: NDArray[np.float32]
    """(B, C, H, W): the sum of a position's weights in all windows that contain it. Each window's weights sum to 1."""
    entropy: NDArray[np.float32]
    """(B, C, h, w): of each window's weights, divided by that of equal weights: 1 for average pooling, 0 for max."""
    logit_mean: float
    logit_std: float
    """Of all logits of the batch, all channels; NaN for max, strided and blur, which have none."""
    layer: str = "lip"
    """The layer, a value of ``WEIGHTED``; or the one of ``compare`` that was put in its place."""

    @property
    def relative_weight(self) -> NDArray[np.float32]:
        """(B, C, H, W): ``weight`` over the weight under average pooling, which depends on the number of windows.

        At least 0 and at most kernel_size^2; 1 for average pooling; NaN where no window reaches.
        """
        size = self.weight.shape[-2:]
        equal = sum_over_windows(window_weights("average", torch.zeros(1, 1, *size), self.window), size, self.window)
        with np.errstate(invalid="ignore"):
            return self.weight / equal.numpy()


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    """Module name -> layer, of the layers of local weights that downsample, in the order of the network's modules.

    Without pooling layers whose windows are not square, are dilated, reach beyond the padding (``ceil_mode``), or count
    zeros of the padding.
    """
    kinds = tuple(WEIGHTED)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds) and _is_plain(module)}
    return {name: layer for name, layer in layers.items() if window_of(layer).stride > 1}


def importance_maps(
    model: nn.Module,
    images: Tensor,
    *,
    sites: Sequence[str] | None = None,
    channels: Sequence[int] | None = None,
    compare: Sequence[str] = (),
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> list[SiteMaps]:
    """Run a network on photographs and return the maps of its sites, in the order of ``sites_of``.

    The modes of its modules are restored and no hook stays. Logits are computed as in the network's own forward, under
    autocast too; the maps are computed in float32. Sites that the forward does not call have no maps; of a site that it
    calls several times they are the last call's.

    Args:
        model: any network with layers of ``WEIGHTED``, with or without a classifier, or timm's ``features_only``.
        images: (B, 3, H, W) uint8 photographs of any size that the network accepts, on any device.
        sites: names out of ``sites_of``; None for all.
        channels: channels to keep; None for the mean over all channels.
        compare: keys of ``weights.WEIGHINGS``: after the maps of a site come those that these layers would have there,
            reading the same features.
        mean, std: (3,), of pixels in [0, 1].

    Raises:
        InputError: the network has no such layer or no such site or channel, or ``images`` are not uint8 photographs.
    """
    maps: dict[str, list[SiteMaps]] = {}

    def visit(name: str, layer: nn.Module, features: Tensor, logits: Tensor) -> None:
        own, window = layer_name(layer), window_of(layer)
        maps[name] = [_maps(name, own, window, logits, channels)]
        maps[name] += [_maps(name, other, window, features, channels) for other in compare]

    wanted = choose_sites(model, sites)
    visit_sites(model, images, wanted, visit, mean, std)
    return [each for name in wanted if name in maps for each in maps[name]]


def choose_sites(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """Those of ``sites_of`` with these names; None for all.

    Raises:
        InputError: the network has none, or not one of these.
    """
    present = sites_of(model)
    if not present:
        kinds = sorted({type(module).__name__ for module in model.modules() if _strides(module)})
        raise InputError(
            f"{type(model).__name__} has no layer of local weights ({', '.join(WEIGHTED.values())}); "
            f"it downsamples by {', '.join(kinds) or 'nothing'}"
        )
    if unknown := [name for name in names or () if name not in present]:
        raise InputError(f"no site {unknown[0]!r}; this network has {', '.join(present)}")
    return {name: layer for name, layer in present.items() if names is None or name in names}


@torch.no_grad()
def visit_sites(
    model: nn.Module,
    images: Tensor,
    sites: Mapping[str, nn.Module],
    visit: Visit,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Run a network on photographs and call ``visit`` when a site's layer has run; arguments as ``importance_maps``.

    Raises:
        InputError: ``images`` are not uint8 photographs.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise InputError(f"images are {tuple(images.shape)} {images.dtype}; they must be (B, 3, H, W) torch.uint8")
    like = next(model.parameters(), torch.empty(0))
    pixel_mean, pixel_std = (torch.tensor(values, device=like.device).view(3, 1, 1) for values in (mean, std))
    inputs = ((images.to(like.device).float() / 255 - pixel_mean) / pixel_std).to(like.dtype)
    modes = [(module, module.training) for module in model.modules()]
    # A compiled forward would not call hooks that came after its compilation.
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()
    model.eval()
    try:
        with _hooked(sites, visit), eager:
            model(inputs)
    finally:
        for module, mode in modes:
            module.training = mode


def layer_name(layer: nn.Module) -> str:
    """A site's layer as a value of ``WEIGHTED``."""
    return next(name for kind, name in WEIGHTED.items() if isinstance(layer, kind))


@contextlib.contextmanager
def _hooked(sites: Mapping[str, nn.Module], visit: Visit) -> Iterator[None]:
    """Let ``visit`` see every site's layer in a forward pass, before a later module can change its input in place."""
    logits: dict[str, Tensor] = {}
    handles = []
    for name, layer in sites.items():

        def record(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            logits[name] = out

        def called(layer: nn.Module, inputs: tuple[Tensor, ...], _out: Tensor, name: str = name) -> None:
            features = inputs[0]
            with torch.autocast(features.device.type, enabled=False):
                values = logits.pop(name) if isinstance(layer, LIP2d) else _logits_of(layer, features)
                visit(name, layer, features.float(), values.float())

        if isinstance(layer, LIP2d):
            handles.append(layer.logits.register_forward_hook(record))
        handles.append(layer.register_forward_hook(called))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits_of(layer: nn.Module, features: Tensor) -> Tensor:
    """The logits by which a layer without a logit module weighs its features (B, C, H, W); else the features."""
    return layer.compute_logits(features) if isinstance(layer, DetailPreserving) else features


def _maps(name: str, layer: str, window: Window, values: Tensor, channels: Sequence[int] | None) -> SiteMaps:
    """The maps of one site from the logits of its layer, or from its features (B, C, H, W)."""
    if channels is not None and not set(channels) <= set(range(values.shape[1])):
        raise InputError(f"{name}: channels {list(channels)}; it has 0 to {values.shape[1] - 1}")
    if layer == "average":
        values = torch.zeros_like(values)
    logit_mean, logit_std = values.mean().item(), values.std(correction=0).item()
    if channels is not None:
        values = values[:, list(channels)]
    weights = window_weights(layer, values, window)
    importance = torch.exp(values - values.amax((2, 3), keepdim=True))
    if layer in ("strided", "blur"):
        importance = torch.full_like(importance, torch.nan)
    if layer in ("max", "strided", "blur"):
        logit_mean = logit_std = math.nan

    def array(part: Tensor) -> NDArray[np.float32]:
        return (part.mean(1, keepdim=True) if channels is None else part).cpu().numpy()

    size = values.shape[-2:]
    weight, entropy = sum_over_windows(weights, size, window), window_entropy(layer, weights, size, window)
    return SiteMaps(name, window, array(importance), array(weight), array(entropy), logit_mean, logit_std, layer)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer's windows are square, without dilation, and weigh only positions inside the map."""
    values: list[Any] = [getattr(layer, name, 1) for name in ("kernel_size", "stride", "padding", "dilation")]
    square = all(isinstance(value, int) or len(set(value)) == 1 for value in values)
    if isinstance(layer, nn.AvgPool2d):
        padded = values[2] not in (0, (0, 0)) and layer.count_include_pad
        square = square and not padded and layer.divisor_override is None
    if isinstance(layer, BlurPool2d):
        square = square and layer.pad_mode == "reflect"
    return square and values[3] in (1, (1, 1)) and not getattr(layer, "ceil_mode", False)


def window_of(layer: nn.Module) -> Window:
    """The window of a site's layer."""
    if isinstance(layer, SoftPool | DetailPreserving | Strided):
        return layer.window
    size = "filt_size" if isinstance(layer, BlurPool2d) else "kernel_size"
    values: list[Any] = [getattr(layer, name) for name in (size, "stride", "padding")]
    return Window(*(value if isinstance(value, int) else value[0] for value in values))


def _strides(module: nn.Module) -> bool:
    stride = getattr(module, "stride", 1)
    return max(stride if isinstance(stride, tuple) else (stride,)) > 1
