"""One window of a network, position by position: its features, and the weights of the network's layer and of others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lip_resnet.insight.importance import choose_sites, layer_name, visit_sites, window_of
from lip_resnet.insight.weights import window_entropy, window_weights
from lip_resnet.layers.window import Window

COMPARED = ("average", "max", "strided", "softpool")
"""The layers of the paper's analysis, and SoftPool."""


@dataclass(frozen=True)
class ExampleWindow:
    """A window that lies inside the map of one channel; k is its kernel size."""

    site: str
    channel: int
    top: int
    left: int
    """Row and column of its first position in the map."""
    map_size: tuple[int, int]
    """(H, W) of the map, in positions."""
    window: Window
    features: Tensor
    """(k, k)"""
    weights: dict[str, Tensor]
    """Layer -> (k, k), which sum to 1; the network's own layer first."""
    entropy: float
    """Of its weights under the network's own layer, over that of equal weights."""
    mean_entropy: float
    """Of all windows of the site."""

    def output(self, layer: str) -> float:
        """What the layer makes of the window."""
        return (self.weights[layer] * self.features).sum().item()


def example_window(
    model: nn.Module,
    image: Tensor,
    site: str,
    *,
    compare: Sequence[str] = COMPARED,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> ExampleWindow | None:
    """A typical window of a site on one photograph; None if no window lies inside the map.

    Of the hundredth of all windows whose entropy is nearest to the site's mean, it is the one whose features differ
    most among each other.

    Args:
        model, mean, std: as for ``importance_maps``.
        image: (3, H, W) uint8.
        site: a name out of ``sites_of``.
        compare: keys of ``weights.WEIGHINGS``.

    Raises:
        InputError: the network has no such site.
    """
    examples: list[ExampleWindow] = []

    def visit(name: str, layer: nn.Module, features: Tensor, logits: Tensor) -> None:
        examples.extend(_choose(name, layer, features, logits, compare))

    visit_sites(model, image[None], choose_sites(model, [site]), visit, mean, std)
    return examples[-1] if examples else None


def _choose(
    name: str, layer: nn.Module, features: Tensor, logits: Tensor, compare: Sequence[str]
) -> list[ExampleWindow]:
    """The example of one site, or none; features and logits are (1, C, H, W)."""
    own, window = layer_name(layer), window_of(layer)
    size, stride, padding = window
    weights = {own: window_weights(own, logits, window)}
    weights |= {other: window_weights(other, features, window) for other in compare if other != own}
    entropy = window_entropy(own, weights[own], logits.shape[-2:], window)[0]
    first = -(-padding // stride)  # windows before it reach into the padding
    ends = [(side + padding - size) // stride + 1 for side in features.shape[-2:]]
    if min(ends) <= first:
        return []
    inside = (slice(None), slice(first, ends[0]), slice(first, ends[1]))
    starts = slice(first * stride - padding, None)
    values = features[0, :, starts, starts].unfold(1, size, stride).unfold(2, size, stride)
    values = values[:, : ends[0] - first, : ends[1] - first]
    distance = (entropy[inside] - entropy.mean()).abs().flatten()
    typical = distance.topk(math.ceil(len(distance) / 100), largest=False).indices
    spread = values.flatten(3).std(-1, correction=0).flatten()
    best = typical[spread[typical].argmax()]
    channel, row, column = (int(index) for index in torch.unravel_index(best, entropy[inside].shape))
    own_weights = {
        kind: each[0, channel, row + first, column + first].view(size, size).cpu() for kind, each in weights.items()
    }
    top, left = ((index + first) * stride - padding for index in (row, column))
    height, width = features.shape[-2:]
    return [
        ExampleWindow(
            name,
            channel,
            top,
            left,
            (height, width),
            window,
            values[channel, row, column].cpu(),
            own_weights,
            entropy[channel, row + first, column + first].item(),
            entropy.mean().item(),
        )
    ]
