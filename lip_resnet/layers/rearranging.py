"""Layers that keep every value of a block of stride x stride positions as channels, then mix the channels.

Each maps (B, C, H, W) to (B, C, h, w) with the output size of its ``Window``; sizes that do not divide by the stride
are filled up by their last row and column.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from lip_resnet.layers.window import Window, WindowLayer, sampling_grids
from lip_resnet.ops.dispatch import layout_of


def _blocks(x: Tensor, window: Window) -> Tensor:
    """(B, C, H, W) -> (B, C * stride^2, h, w): the values of a block, a channel's beside each other."""
    return (
        torch.stack(sampling_grids(x, window, "replicate"), dim=2).flatten(1, 2).contiguous(memory_format=layout_of(x))
    )


class SpaceToDepth(WindowLayer):
    """conv1x1(blocks of x): nothing is dropped before the convolution (SPD-Conv, with a 1x1 convolution).

    Source: Sunkara, Luo, "No More Strided Convolutions or Pooling", ECML PKDD 2022, section 3.
    """

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        self.conv = nn.Conv2d(channels * window.stride**2, channels, 1, bias=False, **factory_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_blocks(x, self.window))


class PatchMerge(WindowLayer):
    """conv1x1(norm(blocks of x)), norm over the channels of a position: the merging of Swin transformers.

    Source: Liu et al., "Swin Transformer", ICCV 2021, section 3.1.
    """

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        self.norm = LayerNorm2d(channels * window.stride**2, **factory_kwargs)
        self.conv = nn.Conv2d(channels * window.stride**2, channels, 1, bias=False, **factory_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(_blocks(x, self.window)))


class Haar(WindowLayer):
    """The low band of the orthonormal Haar wavelet: half the sum of every 2 x 2 block. Stride 2.

    Source: Li et al., "Wavelet Integrated CNNs for Noise-Robust Image Classification", CVPR 2020, section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        return 2 * F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)[..., :h, :w]


class HaarConv(WindowLayer):
    """relu(BN(conv1x1(the four Haar bands))): the low band and the three of details (HWD). Stride 2.

    Source: Xu et al., "Haar Wavelet Downsampling", Pattern Recognition 143, 2023, section 3.
    """

    bands: Tensor

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        bands = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], **factory_kwargs) / 2
        self.register_buffer("bands", bands, persistent=False)
        self.conv = nn.Conv2d(4 * channels, channels, 1, bias=False, **factory_kwargs)
        self.bn = nn.BatchNorm2d(channels, **factory_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.bands.to(x.dtype).repeat(x.shape[1], 1)[:, :, None, None]
        bands = F.conv2d(_blocks(x, self.window), filters, groups=x.shape[1])
        return F.relu(self.bn(self.conv(bands)))
