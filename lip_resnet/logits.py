"""Logit modules: small fully convolutional nets G whose output is the logarithm of LIP's importance.

Each maps features (B, C, H, W) to logits (B, C', H, W) at the same resolution, C' being the channels that are pooled;
the convolution that makes the logits is called ``conv``.

    projection   conv 1x1
    simplified   conv 3x3 -> norm -> gate                                    (published: the stem's)
    bottleneck   trunk: conv 1x1 to the width -> norm -> ReLU -> conv 3x3 -> norm -> ReLU
                 head:  conv 1x1 to C' -> norm -> gate                       (published: width 128)

In a stride-2 block of LIP-ResNet one trunk serves two heads, hence the two classes beside the whole.
Source: paper section 4; reference ``imagenet/lip_resnet.py``.
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from lip_resnet.kernels.norm import norm_act

GATE = 12.0  # the reference's "coefficient"


@register_notrace_module  # its check reads shapes, which torch.fx cannot follow
class InstanceNorm2d(nn.InstanceNorm2d):
    """(B, C, H, W) -> (B, C, H, W): every channel of every image to mean 0 and variance 1, then an affine map.

    ``nn.InstanceNorm2d`` (affine, no running statistics, eps 1e-5), which on the CPU keeps channels-last where the
    original makes a contiguous copy. ``forward(x, activation)`` takes the ReLU or Gate behind it along.

    Raises:
        ValueError: the map has one position; its variance is zero and the norm would return its bias.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__(channels, affine=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        if x.shape[-2] * x.shape[-1] < 2:
            raise ValueError(
                f"instance norm of a {x.shape[-2]}x{x.shape[-1]} feature map; it needs at least 2 positions: "
                "the image is too small for the network"
            )
        if x.dtype == torch.float64:  # rounds as the reference does, so that trajectories can be compared
            x = super().forward(x)
            return x if activation is None else activation(x)
        kind = {nn.ReLU: "relu", Gate: "gate"}.get(type(activation), "none")
        return norm_act(x, self.weight, self.bias, self.eps, kind, getattr(activation, "coefficient", 1.0))


class Gate(nn.Module):
    """z -> coefficient * sigmoid(z): bounds the logits to (0, coefficient), elementwise."""

    def __init__(self, coefficient: float = GATE) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * self.coefficient

    def extra_repr(self) -> str:
        return f"coefficient={self.coefficient}"


class _Chain(nn.Sequential):
    """Its modules one after another; an instance norm takes the activation behind it along, in one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        modules, taken = list(self), None
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if isinstance(module, InstanceNorm2d) and isinstance(following, nn.ReLU | Gate):
                x, taken = module(x, following), following
            elif module is not taken:
                x = module(x)
        return x


def _gate(coefficient: float | None) -> nn.Module:
    return nn.Identity() if coefficient is None else Gate(coefficient)


class ProjectionLogits(nn.Sequential):
    """Logits (B, C, H, W) from x (B, C, H, W): one 1x1 convolution with bias, no norm, no gate."""

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)


class SimplifiedLogits(_Chain):
    """Logits (B, C, H, W) from x (B, C, H, W): gate(norm(conv3x3(x))). ``gate=None`` leaves the gate out."""

    def __init__(self, channels: int, gate: float | None = GATE, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **dd)
        self.norm = InstanceNorm2d(channels, **dd)
        self.gate = _gate(gate)


class BottleneckTrunk(_Chain):
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


class BottleneckHead(_Chain):
    """Trunk features (B, width, H, W) -> logits (B, channels, H, W): gate(norm(conv1x1(trunk)))."""

    def __init__(self, width: int, channels: int, gate: float | None = GATE, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(width, channels, 1, bias=False, **dd)
        self.norm = InstanceNorm2d(channels, **dd)
        self.gate = _gate(gate)


class BottleneckLogits(BottleneckTrunk):
    """Logits (B, C, H, W) from x (B, C, H, W): a trunk and a head of its own, in one."""

    def __init__(self, channels: int, width: int = 128, gate: float | None = GATE, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(channels, width, **dd)
        self.conv = nn.Conv2d(width, channels, 1, bias=False, **dd)
        self.norm = InstanceNorm2d(channels, **dd)
        self.gate = _gate(gate)
