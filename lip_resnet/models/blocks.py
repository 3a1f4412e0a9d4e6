"""Residual blocks of LIP-ResNet, and the downsampling layers of those with stride 2.

Letters in the shapes: B images, C channels, H x W input positions, h x w output positions.
"""

from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from lip_resnet.layers.downsampling import LogitOptions, check_layer, make_layer
from lip_resnet.layers.logits import BottleneckHead, BottleneckTrunk
from lip_resnet.layers.pooling import LIP2d


class Downsample(nn.Sequential):
    """A shortcut that changes the shape, (B, C, H, W) -> (B, out_channels, h, w): [layer ->] conv 1x1 -> BN."""

    def __init__(
        self, in_channels: int, out_channels: int, pool: nn.Module | None = None, **factory_kwargs: Any
    ) -> None:
        super().__init__()
        self.pool = pool or nn.Identity()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory_kwargs)
        self.bn = nn.BatchNorm2d(out_channels, **factory_kwargs)

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        return self.bn(self.conv(_pool(self.pool, x, trunk)))


def _pool(layer: nn.Module, x: Tensor, trunk: Tensor | None) -> Tensor:
    """Apply a downsampling layer; LIP layers also get the block's trunk features."""
    return layer(x, trunk) if isinstance(layer, LIP2d) else layer(x)


class Bottleneck(nn.Module):
    """(B, in_channels, H, W) -> (B, 4 * channels, h, w): conv 1x1, conv 3x3, conv 1x1 and a shortcut.

    With stride 2, ``pool`` and a 1x1 convolution replace the 3x3 convolution, and ``shortcut_pool`` precedes the
    shortcut's convolution; ``trunk`` computes the features from which the LIPs of both make their logits.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        drop_path: float = 0.0,
        trunk: nn.Module | None = None,
        pool: nn.Module | None = None,
        shortcut_pool: nn.Module | None = None,
        **factory_kwargs: Any,
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False, **factory_kwargs)
        self.bn1 = nn.BatchNorm2d(channels, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.trunk = trunk
        self.pool = pool
        kernel = 3 if pool is None else 1
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False, **factory_kwargs)
        self.bn2 = nn.BatchNorm2d(channels, **factory_kwargs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False, **factory_kwargs)
        self.bn3 = nn.BatchNorm2d(out_channels, **factory_kwargs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = None
        if pool is not None or in_channels != out_channels:
            self.downsample = Downsample(in_channels, out_channels, shortcut_pool, **factory_kwargs)
        self.act3 = nn.ReLU(inplace=True)

    def zero_init_last(self) -> None:
        """Zero the last BN's weight, so that the block starts as its shortcut."""
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        trunk = None if self.trunk is None else self.trunk(x)
        shortcut = x if self.downsample is None else self.downsample(x, trunk)
        x = self.act1(self.bn1(self.conv1(x)))
        if self.pool is not None:
            x = _pool(self.pool, x, trunk)
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.drop_path(self.bn3(self.conv3(x)))
        return self.act3(x + shortcut)


class BasicBlock(nn.Module):
    """(B, in_channels, H, W) -> (B, channels, h, w): two 3x3 convolutions and a shortcut.

    With stride 2 the first convolution runs at stride 1 and ``pool`` follows it; the rest is as in ``Bottleneck``.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        drop_path: float = 0.0,
        trunk: nn.Module | None = None,
        pool: nn.Module | None = None,
        shortcut_pool: nn.Module | None = None,
        **factory_kwargs: Any,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False, **factory_kwargs)
        self.trunk = trunk
        self.pool = pool
        self.bn1 = nn.BatchNorm2d(channels, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **factory_kwargs)
        self.bn2 = nn.BatchNorm2d(channels, **factory_kwargs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = None
        if pool is not None or in_channels != channels:
            self.downsample = Downsample(in_channels, channels, shortcut_pool, **factory_kwargs)
        self.act2 = nn.ReLU(inplace=True)

    def zero_init_last(self) -> None:
        """Zero the last BN's weight, so that the block starts as its shortcut."""
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        trunk = None if self.trunk is None else self.trunk(x)
        shortcut = x if self.downsample is None else self.downsample(x, trunk)
        x = self.conv1(x)
        if self.pool is not None:
            x = _pool(self.pool, x, trunk)
        x = self.act1(self.bn1(x))
        x = self.drop_path(self.bn2(self.conv2(x)))
        return self.act2(x + shortcut)


def stride2_layers(
    sites: dict[str, tuple[str, int]],
    in_channels: int,
    kernel_size: int,
    options: LogitOptions,
    factory_kwargs: dict[str, Any],
) -> dict[str, nn.Module | None]:
    """The layers of a stride-2 block, as keyword arguments of the block.

    ``lip`` with bottleneck logits is a head on a trunk that both sites share; any other layer is independent.

    Args:
        sites: ``main`` and ``shortcut``, each with the name of its layer and the channels that are pooled.
        in_channels: of the block, which the trunk reads.
        kernel_size: of the windows.
        options: of the logit modules.
        factory_kwargs: ``device`` and ``dtype`` of the parameters.
    """
    layers: dict[str, nn.Module] = {}
    for site, (name, channels) in sites.items():
        if check_layer(name, site) == "lip" and options.module == "bottleneck":
            layers[site] = LIP2d(BottleneckHead(options.width, channels, options.gate, **factory_kwargs), kernel_size)
        else:
            layers[site] = make_layer(name, channels, kernel_size, options=options, **factory_kwargs)
    shared = any(isinstance(layer, LIP2d) and isinstance(layer.logits, BottleneckHead) for layer in layers.values())
    trunk = BottleneckTrunk(in_channels, options.width, **factory_kwargs) if shared else None
    return {"trunk": trunk, "pool": layers["main"], "shortcut_pool": layers["shortcut"]}
