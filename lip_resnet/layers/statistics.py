"""Layers that reduce a window by another statistic than its weighted mean: learnt norms, ranks, mixtures of two.

Each maps (B, C, H, W) to (B, C, h, w) with the output size of its ``Window``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lip_resnet.layers.window import Window, WindowLayer, window_slices
from lip_resnet.ops.dispatch import layout_of
from lip_resnet.ops.lip import lip2d


class LearntNorm(WindowLayer):
    """(mean of |x|^p over the window)^(1/p), p = 1 + softplus(rho) learnt for each channel, 2 at the start.

    p = 1 is the mean of |x|, large p its maximum. Float32 inside; values are divided by a map's largest, so that no
    power overflows. Source: Gulcehre et al., "Learned-Norm Pooling", ECML 2014.
    """

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        self.rho = nn.Parameter(torch.full((channels, 1, 1), 0.5413, **factory_kwargs))  # softplus gives 1

    def forward(self, x: Tensor) -> Tensor:
        p = 1 + F.softplus(self.rho.float())
        size = x.float().abs()
        scale = size.amax((2, 3), keepdim=True).detach().clamp(min=1e-6)
        mean = F.avg_pool2d(((size / scale).clamp(min=1e-6)) ** p, *self.window, count_include_pad=False)
        return (scale * mean ** (1 / p)).to(x.dtype)


class Ordinal(WindowLayer):
    """The values of a window, sorted and weighted by rank; the weights, softmax of learnt numbers, are a channel's own.

    They start equal: average pooling. A window at the edge repeats the map's last row and column. Source: Deliege et
    al., "Ordinal Pooling", BMVC 2019.
    """

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        self.ranks = nn.Parameter(torch.zeros(channels, window.kernel_size**2, **factory_kwargs))

    def forward(self, x: Tensor) -> Tensor:
        values = torch.stack(list(window_slices(x, self.window, "replicate")), dim=-1).sort(dim=-1).values
        y = torch.einsum("bchwk,ck->bchw", values, self.ranks.softmax(1).to(x.dtype))
        return y.contiguous(memory_format=layout_of(x))


class MaxAverage(WindowLayer):
    """a * max + (1 - a) * average of every window; a in (0, 1) starts at 1/2.

    mixed: one learnt a = sigmoid(m). gated: a = sigmoid(m + <mask, window>), one learnt mask for all channels.
    Source: Lee, Gallagher, Tu, "Generalizing Pooling Functions", AISTATS 2016.
    """

    def __init__(self, window: Window, gated: bool, device=None, dtype=None) -> None:
        super().__init__(window)
        factory_kwargs, side = {"device": device, "dtype": dtype}, window.kernel_size
        self.mix = nn.Parameter(torch.zeros(1, **factory_kwargs))
        self.mask = nn.Parameter(torch.zeros(1, 1, side, side, **factory_kwargs)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        largest = F.max_pool2d(x, *self.window)
        mean = F.avg_pool2d(x, *self.window, count_include_pad=False)
        mix: Tensor = self.mix
        if self.mask is not None:
            mix = F.conv2d(x.flatten(0, 1).unsqueeze(1), self.mask, self.mix, *self.window[1:]).reshape(mean.shape)
        return mean + torch.sigmoid(mix) * (largest - mean)


class AdaPool(WindowLayer):
    """b * S(x) + (1 - b) * SoftPool(x), b = sigmoid(mix) in (0, 1), one learnt number a layer, 1/2 at the start.

    S weighs a position by exp(2 |x m| / (x^2 + m^2)), m the mean of its window: the Dice-Sorensen coefficient of the
    two. Padding has no weight; float32 inside. Source: Stergiou, Poppe, "AdaPool", IEEE TIP 2023.
    """

    def __init__(self, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        self.mix = nn.Parameter(torch.zeros(1, **factory_kwargs))

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.stack(list(window_slices(torch.ones_like(x[:1, :1]), self.window, "constant"))).float()
        values = torch.stack(list(window_slices(x, self.window, "constant"))).float()  # (k^2, B, C, h, w)
        mean = values.sum(0) / inside.sum(0)
        similarity = 2 * (values * mean).abs() / (values.square() + mean.square()).clamp(min=1e-30)
        weights = similarity.exp() * inside
        similar = (weights * values).sum(0) / weights.sum(0)
        soft = lip2d(x, x, *self.window)
        return (soft + torch.sigmoid(self.mix) * (similar.to(x.dtype) - soft)).contiguous(memory_format=layout_of(x))
