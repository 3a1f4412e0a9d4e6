"""Downsampling by small convolutions, from detectors: (B, C, H, W) -> (B, C, h, w)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lip_resnet.layers.window import Window, WindowLayer


def _conv(in_channels: int, out_channels: int, window: Window, groups: int = 1, **factory_kwargs: Any) -> nn.Sequential:
    """A convolution without bias, and batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, *window, groups=groups, bias=False, **factory_kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels, **factory_kwargs))


class ADown(WindowLayer):
    """Average of 2 x 2 at stride 1; then a strided convolution of one half of the channels, max pooling and a 1x1
    convolution of the other half. SiLU after each, as in YOLOv9 (Wang, Yeh, Liao, ECCV 2024)."""

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(window)
        self.first, self.second = channels - channels // 2, channels // 2
        self.strided = _conv(self.first, self.first, window, **factory_kwargs)
        self.pointwise = _conv(self.second, self.second, Window(1, 1, 0), **factory_kwargs) if self.second else None

    def forward(self, x: Tensor) -> Tensor:
        # Padding keeps the size, so that the window decides the output size.
        x = F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)
        halves = [F.silu(self.strided(x[:, : self.first]))]
        if self.pointwise is not None:
            halves.append(F.silu(self.pointwise(F.max_pool2d(x[:, self.first :], *self.window))))
        return torch.cat(halves, dim=1)


class SCDown(nn.Sequential):
    """A 1x1 convolution with SiLU, then a strided depthwise one: YOLOv10's spatial-channel decoupled downsampling.

    Source: Wang et al., "YOLOv10: Real-Time End-to-End Object Detection", NeurIPS 2024, section 3.2.
    """

    def __init__(self, channels: int, window: Window, **factory_kwargs: Any) -> None:
        super().__init__(
            _conv(channels, channels, Window(1, 1, 0), **factory_kwargs),
            nn.SiLU(),
            _conv(channels, channels, window, groups=channels, **factory_kwargs),
        )
