"""Logit modules: small fully convolutional networks G whose output is the logarithm of LIP's importance.

Each maps features (B, C, H, W) to logits (B, C', H, W) at the same resolution, C' being the number of channels that are
pooled. The last convolution of each is called ``conv``.

    projection   conv 1x1
    attention    patches 4x4 -> self-attention -> bilinear upsampling -> conv 1x1 -> sigmoid  (not in the paper)
    simplified   conv 3x3 -> norm -> gate                                    (published: in the stem)
    bottleneck   trunk: conv 1x1 to the width -> norm -> ReLU -> conv 3x3 -> norm -> ReLU
                 head:  conv 1x1 to C' -> norm -> gate                       (published: width 128)

In a stride-2 block of LIP-ResNet two heads share one trunk, so trunk and head are also classes of their own.
Source: paper section 4; reference ``imagenet/lip_resnet.py``.
"""

import math

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from lip_resnet.ops.dispatch import layout_of
from lip_resnet.ops.norm import norm_act

GATE = 12.0  # the reference's "coefficient"


@register_notrace_module  # forward checks shapes, which torch.fx cannot trace
class InstanceNorm2d(nn.InstanceNorm2d):
    """(B, C, H, W) -> (B, C, H, W): every channel of every image to mean 0 and variance 1, then an affine map.

    ``nn.InstanceNorm2d`` (affine, no running statistics, eps 1e-5) that keeps channels-last, where PyTorch's makes a
    contiguous copy. ``forward(x, activation)`` also applies an activation: ReLU or Gate in the same pass over memory.

    Raises:
        ValueError: the feature map has one position: its variance is zero, and the norm would return its bias.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__(channels, affine=True, device=device, dtype=dtype)
        self.valid_area: tuple[int, list[tuple[int, int]]] | None = None
        """Height of the canvas that the network's images are padded to, and height and width of every image on it from
        the upper left corner, pixels: statistics are of these positions alone, and the result is zero outside them."""

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        if self.valid_area is None:
            return self._normalize(x, activation)
        height, width = x.shape[-2:]
        stride = self.valid_area[0] // height
        areas = [(-(-h // stride), -(-w // stride)) for h, w in self.valid_area[1]]
        if all(area == (height, width) for area in areas):
            return self._normalize(x, activation)
        layout = layout_of(x)
        images = [
            F.pad(
                self._normalize(image[None, :, :h, :w].contiguous(memory_format=layout), activation),
                (0, width - w, 0, height - h),
            )
            for image, (h, w) in zip(x, areas, strict=True)
        ]
        return torch.cat(images).contiguous(memory_format=layout)  # F.pad makes one image contiguous

    def _normalize(self, x: Tensor, activation: nn.Module | None) -> Tensor:
        if x.shape[-2] * x.shape[-1] < 2:
            raise ValueError(
                f"instance norm of a {x.shape[-2]}x{x.shape[-1]} feature map; it needs at least 2 positions: "
                "the image is too small for the network"
            )
        # In float64 PyTorch's own norm, which rounds as the reference code does, so that training trajectories can be
        # compared. Not for a batch of one: there its gradient is wrong if the incoming gradient is channels-last
        # (torch 2.14, CPU: it reads the memory in the wrong order).
        if x.dtype == torch.float64 and x.shape[0] > 1:
            x = super().forward(x)
            return x if activation is None else activation(x)
        if isinstance(activation, Gate):
            return norm_act(x, self.weight, self.bias, self.eps, "gate", activation.coefficient)
        if isinstance(activation, nn.ReLU):
            return norm_act(x, self.weight, self.bias, self.eps, "relu")
        x = norm_act(x, self.weight, self.bias, self.eps, "none")
        return x if activation is None else activation(x)


class Gate(nn.Module):
    """z -> coefficient * sigmoid(z), elementwise: bounds the logits to (0, coefficient)."""

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


class SimplifiedLogits(nn.Module):
    """Logits (B, C, H, W) from x (B, C, H, W): gate(norm(conv3x3(x))). ``gate=None`` omits the gate."""

    def __init__(self, channels: int, gate: float | None = GATE, device=None, dtype=None) -> None:
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **factory_kwargs)
        self.norm = InstanceNorm2d(channels, **factory_kwargs)
        self.gate = _gate(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), self.gate)


class BottleneckTrunk(nn.Module):
    """x (B, C, H, W) -> (B, width, H, W): the part of the bottleneck logit module that several heads can share."""

    def __init__(self, channels: int, width: int = 128, device=None, dtype=None) -> None:
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False, **factory_kwargs)
        self.norm1 = InstanceNorm2d(width, **factory_kwargs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **factory_kwargs)
        self.norm2 = InstanceNorm2d(width, **factory_kwargs)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x), self.act1)
        return self.norm2(self.conv2(x), self.act2)


class BottleneckHead(nn.Module):
    """Trunk features (B, width, H, W) -> logits (B, channels, H, W): gate(norm(conv1x1(trunk)))."""

    def __init__(self, width: int, channels: int, gate: float | None = GATE, device=None, dtype=None) -> None:
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(width, channels, 1, bias=False, **factory_kwargs)
        self.norm = InstanceNorm2d(channels, **factory_kwargs)
        self.gate = _gate(gate)

    def forward(self, trunk: Tensor) -> Tensor:
        return self.norm(self.conv(trunk), self.gate)


class BottleneckLogits(BottleneckTrunk):
    """Logits (B, C, H, W) from x (B, C, H, W): the complete bottleneck logit module, trunk and head."""

    def __init__(self, channels: int, width: int = 128, gate: float | None = GATE, device=None, dtype=None) -> None:
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__(channels, width, **factory_kwargs)
        self.conv = nn.Conv2d(width, channels, 1, bias=False, **factory_kwargs)
        self.norm = InstanceNorm2d(channels, **factory_kwargs)
        self.gate = _gate(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(super().forward(x)), self.gate)


@register_notrace_module  # forward needs the map's size, which torch.fx cannot trace
class AttentionLogits(nn.Module):
    """Logits (B, C, H, W) from x (B, C, H, W): sigmoid of a map that every patch of the input attends to.

    Patches of 4x4 become ``width`` channels, self-attention mixes them all (four heads, no position embedding, so that
    any size works), and bilinear upsampling and a 1x1 convolution restore H, W and C. Source: Chen et al.,
    "Self-Attentive Pooling for Efficient Deep Learning", WACV 2023.
    """

    patch = 4

    def __init__(self, channels: int, width: int = 128, device=None, dtype=None) -> None:
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.heads = math.gcd(width, 4)
        self.embed = nn.Conv2d(channels, width, self.patch, stride=self.patch, **factory_kwargs)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False, **factory_kwargs)
        self.conv = nn.Conv2d(width, channels, 1, **factory_kwargs)
        self.gate = Gate(1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(F.pad(x, (0, self.patch - 1, 0, self.patch - 1)))  # (B, width, h, w)
        query, key, value = self.qkv(y).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, h * w, width / heads)
        y = mixed.transpose(-1, -2).flatten(1, 2).unflatten(2, y.shape[2:])
        return self.gate(self.conv(F.interpolate(y, size=x.shape[2:], mode="bilinear")))
