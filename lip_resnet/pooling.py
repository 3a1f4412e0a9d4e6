"""Downsampling layers: LIP and the modules that make its logits.

A logit module maps features (B, C, H, W) to logits (B, C', H, W) at the same resolution, C' being the channels that
are pooled. ``LIP2d`` joins one to the operator. Published names (paper section 4, reference ``lip_resnet.py``):

    projection   conv 1x1
    simplified   conv 3x3 -> norm -> gate                                    (the stem's)
    bottleneck   trunk: conv 1x1 to the width -> norm -> ReLU -> conv 3x3 -> norm -> ReLU
                 head:  conv 1x1 to C' -> norm -> gate                       (Bottleneck-128: width 128)

In a stride-2 block of LIP-ResNet one trunk serves two heads, hence the two classes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lip_resnet.lip import lip2d

GATE = 12.0  # the reference's "coefficient"


class InstanceNorm2d(nn.InstanceNorm2d):
    """(B, C, H, W) -> (B, C, H, W): every channel of every image to mean 0 and variance 1, then an affine map.

    ``nn.InstanceNorm2d`` (affine, no running statistics, eps 1e-5) computed as a group norm of C groups: the same
    function, which on the CPU keeps channels-last where the original makes a contiguous copy.

    Raises:
        ValueError: the map has one position; its variance is zero and the norm would return its bias.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__(channels, affine=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] * x.shape[-1] < 2:
            raise ValueError(
                f"instance norm of a {x.shape[-2]}x{x.shape[-1]} feature map; it needs at least 2 positions: "
                "the image is too small for the network"
            )
        if x.dtype == torch.float64:  # rounds as the reference does, so that trajectories can be compared
            return super().forward(x)
        return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


class Gate(nn.Module):
    """z -> coefficient * sigmoid(z): bounds the logits to (0, coefficient), elementwise."""

    def __init__(self, coefficient: float = GATE) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * self.coefficient

    def extra_repr(self) -> str:
        return f"coefficient={self.coefficient}"


def _gate(coefficient: float | None) -> nn.Module:
    return nn.Identity() if coefficient is None else Gate(coefficient)


class ProjectionLogits(nn.Sequential):
    """Logits (B, C, H, W) from x (B, C, H, W): one 1x1 convolution with bias, no norm, no gate."""

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)


class SimplifiedLogits(nn.Sequential):
    """Logits (B, C, H, W) from x (B, C, H, W): gate(norm(conv3x3(x))). ``gate=None`` leaves the gate out."""

    def __init__(self, channels: int, gate: float | None = GATE, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **dd)
        self.norm = InstanceNorm2d(channels, **dd)
        self.gate = _gate(gate)


class BottleneckTrunk(nn.Sequential):
    """x (B, C, H, W) -> (B, width, H, W): the part of the bottleneck logit module that sites can share."""

    def __init__(self, channels: int, width: int = 128, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False, **dd)
        self.norm1 = InstanceNorm2d(width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.norm2 = InstanceNorm2d(width, **dd)
        self.act2 = nn.ReLU(inplace=True)


class BottleneckHead(nn.Sequential):
    """Trunk features (B, width, H, W) -> logits (B, channels, H, W): gate(norm(conv1x1(trunk)))."""

    def __init__(self, width: int, channels: int, gate: float | None = GATE, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(width, channels, 1, bias=False, **dd)
        self.norm = InstanceNorm2d(channels, **dd)
        self.gate = _gate(gate)


class LIP2d(nn.Module):
    """x (B, C, H, W) -> (B, C, h, w): ``lip2d(x, G(x))`` with a learnt logit module G.

    Args:
        logits: the logit module. Its last convolution must be called ``conv`` (see ``zero_logits``).
        kernel_size, stride: of the window, in positions. The padding is (kernel_size - 1) // 2.

    Source: paper section 3; classes ``SimplifiedLIP`` and ``BottleneckLIP`` of the reference.
    """

    def __init__(self, logits: nn.Module, kernel_size: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.logits = logits
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = (kernel_size - 1) // 2

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        """Pool ``x``; the logits are made from ``trunk`` (B, width, H, W) where one is given, else from ``x``."""
        logits = self.logits(x if trunk is None else trunk)
        return lip2d(x, logits, self.kernel_size, self.stride, self.padding)

    def zero_logits(self) -> None:
        """Zero the convolution that makes the logits: they become constant and LIP starts as average pooling."""
        nn.init.zeros_(self.logits.conv.weight)
        if self.logits.conv.bias is not None:
            nn.init.zeros_(self.logits.conv.bias)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def logit_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of the convolutions that make a network's logits; none for a network without LIP.

    Zero at the start, in front of an instance norm of zero variance: at step 0 the norm multiplies their gradient by
    1 / sqrt(eps) = 316, so a gradient norm is worth reading without them too.
    """
    for module in model.modules():
        if isinstance(module, LIP2d):
            yield from module.logits.conv.parameters()
