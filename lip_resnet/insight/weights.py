"""The weights that downsampling layers give to the positions of their windows, and what follows from them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lip_resnet.layers.window import Window

WEIGHINGS = {
    "average": "every position the same",
    "max": "all weight on the largest feature",
    "strided": "all weight on the centre",
    "softpool": "exp(feature)",
    "blur": "a fixed binomial filter",
}
"""Layers whose weights follow from the features that they pool -> how they weigh; to be put beside a network's own."""


def window_weights(layer: str, values: Tensor, window: Window) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w, k * k): the weights of every window, row by row, which sum to 1.

    Args:
        layer: a key of ``WEIGHINGS``; of all other names the weights are exp(value), normalised in the window.
        values: the features, or the logits where the weights are exp(value).
        window: padding has weight 0, but blur's stands for the positions of which it is the reflection.
    """
    size, stride, padding = window
    if layer in ("strided", "blur"):
        h, w = map(window.out, values.shape[-2:])
        binomial, centre = [math.comb(size - 1, k) for k in range(size)], (size - 1) // 2
        line = values.new_tensor(binomial if layer == "blur" else [k == centre for k in range(size)])
        kernel = torch.outer(line, line).flatten()
        return (kernel / kernel.sum()).expand(*values.shape[:2], h, w, size * size)
    if layer == "average":
        values = torch.zeros_like(values)
    padded = F.pad(values, [padding] * 4, value=-torch.inf)
    in_windows = padded.unfold(2, size, stride).unfold(3, size, stride).flatten(4)
    if layer == "max":
        return F.one_hot(in_windows.argmax(-1), size * size).to(values.dtype)
    return in_windows.softmax(-1)


def sum_over_windows(weights: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """(B, C, h, w, k * k) -> (B, C, H, W), ``size`` = (H, W): the weights of a position, added over its windows."""
    batch, channels, h, w, positions = weights.shape
    columns = weights.reshape(batch * channels, h * w, positions).transpose(1, 2)
    padded = (size[0] + 2 * window.padding, size[1] + 2 * window.padding)
    total = F.fold(columns, padded, window.kernel_size, stride=window.stride).reshape(batch, channels, *padded)
    for dim, side in ((2, size[0]), (3, size[1])):
        mode = "reflect" if window.padding < side else "replicate"
        inside = torch.arange(side, dtype=torch.float32, device=weights.device)
        source = F.pad(inside[None, None], [window.padding] * 2, mode=mode).flatten().long()
        shape = (*total.shape[:dim], side, *total.shape[dim + 1 :])
        total = total.new_zeros(shape).index_add_(dim, source, total)
    return total


def window_entropy(layer: str, weights: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """(B, C, h, w, k * k) -> (B, C, h, w): entropy over that of equal weights on the window's positions inside the map.

    Args:
        layer: as for ``window_weights``; of blur, the positions in the padding count too.
        size: (H, W) of the map.
    """
    kernel_size, stride, padding = window
    inside = F.pad(weights.new_ones(tuple(size)), [padding] * 4, value=float(layer == "blur"))
    count = inside.unfold(0, kernel_size, stride).unfold(1, kernel_size, stride).sum((-1, -2))
    entropy = torch.special.entr(weights).sum(-1) / count.clamp(min=2).log()
    return torch.where(count > 1, entropy, torch.ones_like(entropy))
