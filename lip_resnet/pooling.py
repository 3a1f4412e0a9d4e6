"""Downsampling layers: LIP, and everything it is compared with, behind one interface.

Every layer maps features (B, C, H, W) to (B, C, h, w), h = floor((H + 2 * padding - kernel_size) / stride) + 1, and is
made by ``make_layer(name, channels, kernel_size, stride, padding)``; ``LAYERS``, at the end, lists the names. Most are
one idea: the mean of a window, weighted by an importance F(x) > 0 of which only the logarithm, the logits, is needed:

    y[p] = sum_{q in W(p)} F(x)[q] * x[q]  /  sum_{q in W(p)} F(x)[q]  =  lip2d(x, log F(x))

LIP learns the logits (``logits.py``). Source: paper, section 3.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lip_resnet.lip import lip2d
from lip_resnet.logits import GATE, BottleneckHead, BottleneckLogits, ProjectionLogits, SimplifiedLogits

# The operator's checks read shapes, which torch.fx cannot follow: it stays one node of a traced graph. So do the
# modules marked alike below.
register_notrace_function(lip2d)


class LIP2d(nn.Module):
    """x (B, C, H, W) -> (B, C, h, w): ``lip2d(x, G(x))`` with a learnt logit module G.

    Args:
        logits: the logit module G. The convolution that makes the logits must be called ``conv``; it starts at zero,
            so that LIP starts as average pooling.
        kernel_size, stride, padding: of the window, in positions; no padding given is (kernel_size - 1) // 2.
    """

    def __init__(self, logits: nn.Module, kernel_size: int = 3, stride: int = 2, padding: int | None = None) -> None:
        super().__init__()
        self.logits = logits
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = (kernel_size - 1) // 2 if padding is None else padding
        self.recompute = False
        """Make the logits again in the backward pass instead of keeping them: less memory, one more branch."""
        self.zero_logits()

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        """Pool ``x``; a head makes its logits from ``trunk`` (B, width, H, W), any other logit module from ``x``."""
        source = trunk if isinstance(self.logits, BottleneckHead) else x
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._pool, x, source, use_reentrant=False)
        return self._pool(x, source)

    def _pool(self, x: Tensor, source: Tensor) -> Tensor:
        return lip2d(x, self.logits(source), self.kernel_size, self.stride, self.padding)

    def zero_logits(self) -> None:
        """Zero the convolution that makes the logits: they become constant, and LIP average pooling."""
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


class Window(NamedTuple):
    """Of a layer, in positions."""

    kernel_size: int
    stride: int
    padding: int

    def out(self, size: int) -> int:
        """Length of the output along a side of ``size``."""
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1


class SoftPool(nn.Module):
    """lip2d(x, x): every position weighted by exp(x), G(x) = x."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return lip2d(x, x, *self.window)


@register_notrace_module
class Strided(nn.Module):
    """x at the centre of every window (the left or upper one of two): importance 1 on a grid, 0 off it."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.first = (window.kernel_size - 1) // 2 - window.padding

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        return x[..., self.first :: self.window.stride, self.first :: self.window.stride][..., :h, :w]


@register_notrace_module
class StridedAverage(nn.Module):
    """The mean of stride x stride positions, no overlap and no padding, whatever the site's window."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        return F.avg_pool2d(x, self.window.stride, ceil_mode=True, count_include_pad=False)[..., :h, :w]


class DetailPreserving(nn.Module):
    """Importance alpha + (d^2 + eps^2)^(lambda / 2), d = x - mean of x in 3x3: grows with the distance from the mean.

    alpha and lambda are positive and learnt, one a channel, from alpha = lambda = 1. This is the symmetric, "lite"
    form (mean by a box filter) as local aggregation and normalisation: the mean is taken around q, not around p.
    """

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__()
        self.window = window
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))
        self.log_lambda = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        detail = x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        reward = torch.pow(detail * detail + 1e-6, torch.exp(self.log_lambda) / 2)
        return lip2d(x, torch.log(torch.exp(self.log_alpha) + reward).to(x.dtype), *self.window)


class MaxAverage(nn.Module):
    """a * max + (1 - a) * average of every window, a in (0, 1), from a = 1/2.

    mixed: one learnt a = sigmoid(m). gated: a = sigmoid(m + <mask, window>), one learnt mask for all channels.
    """

    def __init__(self, window: Window, gated: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.window = window
        dd = {"device": device, "dtype": dtype}
        self.mix = nn.Parameter(torch.zeros(1, **dd))
        self.mask = nn.Parameter(torch.zeros(1, 1, window.kernel_size, window.kernel_size, **dd)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        largest = F.max_pool2d(x, *self.window)
        mean = F.avg_pool2d(x, *self.window, count_include_pad=False)
        mix = self.mix
        if self.mask is not None:
            mix = F.conv2d(x.flatten(0, 1).unsqueeze(1), self.mask, self.mix, *self.window[1:]).reshape(mean.shape)
        return mean + torch.sigmoid(mix) * (largest - mean)


class Blur(BlurPool2d):
    """timm's binomial filter of the window's size, reflecting at the border, with the window's own padding."""

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__(channels, window.kernel_size, window.stride)
        self.to(device, dtype)  # timm 1.0.20 takes neither as an argument
        self.padding = [window.padding] * 4


@dataclass(frozen=True)
class LogitOptions:
    """How the logits of LIP layers are made; the other layers have no use for it.

    Raises:
        ValueError: unknown module, width below 1, coefficient not positive and finite.
    """

    module: str = "bottleneck"
    """What ``lip`` means: projection, simplified or bottleneck."""
    width: int = 128
    """Channels of the bottleneck's trunk (published: 128; ablations: 64 and 256)."""
    gate: float | None = GATE
    """Bound of the logits; None leaves the gate out."""

    def __post_init__(self) -> None:
        if f"lip_{self.module}" not in LAYERS:
            raise ValueError(f"logit module {self.module!r}; it must be projection, simplified or bottleneck")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"bottleneck width {self.width!r}; it must be an integer of at least 1")
        if self.gate is not None and not (isinstance(self.gate, int | float) and 0 < self.gate < math.inf):
            raise ValueError(f"gate coefficient {self.gate!r}; it must be a positive, finite number")


class Layer(NamedTuple):
    """A row of ``LAYERS``: ``build(channels, window, options, device=..., dtype=...)``, what it does, where from."""

    build: Callable[..., nn.Module]
    line: str
    source: str


def _projection(channels: int, window: Window, options: LogitOptions, **dd: Any) -> LIP2d:
    return LIP2d(ProjectionLogits(channels, **dd), *window)


def _simplified(channels: int, window: Window, options: LogitOptions, **dd: Any) -> LIP2d:
    return LIP2d(SimplifiedLogits(channels, options.gate, **dd), *window)


def _bottleneck(channels: int, window: Window, options: LogitOptions, **dd: Any) -> LIP2d:
    return LIP2d(BottleneckLogits(channels, options.width, options.gate, **dd), *window)


_LIP = "Gao, Wang, Wu, ICCV 2019"
_LEE = "Lee, Gallagher, Tu, AISTATS 2016"

LAYERS: dict[str, Layer] = {
    "lip": Layer(
        lambda c, w, o, **dd: LAYERS[f"lip_{o.module}"].build(c, w, o, **dd),
        "learnt importance, with the site's published logit module (or the one asked for)",
        _LIP,
    ),
    "lip_projection": Layer(_projection, "learnt importance, logits from a 1x1 convolution", _LIP),
    "lip_simplified": Layer(_simplified, "learnt importance, logits from a 3x3 convolution, norm and gate", _LIP),
    "lip_bottleneck": Layer(_bottleneck, "learnt importance, logits from a bottleneck of three convolutions", _LIP),
    "average": Layer(
        lambda c, w, o, **dd: nn.AvgPool2d(*w, count_include_pad=False), "importance 1: the window's mean", "classical"
    ),
    "max": Layer(lambda c, w, o, **dd: nn.MaxPool2d(*w), "the window's maximum, LIP's limit for a * x", "classical"),
    "strided": Layer(lambda c, w, o, **dd: Strided(w), "the window's centre, as in a strided convolution", "classical"),
    "strided_average": Layer(
        lambda c, w, o, **dd: StridedAverage(w), "stride x stride mean (ResNet-D)", "He et al., CVPR 2019"
    ),
    "blur": Layer(
        lambda c, w, o, **dd: Blur(c, w, **dd), "binomial low-pass filter, then sampling", "Zhang, ICML 2019"
    ),
    "softpool": Layer(
        lambda c, w, o, **dd: SoftPool(w), "importance exp(x): G(x) = x", "Stergiou, Poppe, Kalliatakis, ICCV 2021"
    ),
    "detail_preserving": Layer(
        lambda c, w, o, **dd: DetailPreserving(c, w, **dd),
        "importance grows with the distance from the local mean",
        "Saeedan, Weber, Goesele, Roth, CVPR 2018",
    ),
    "mixed": Layer(lambda c, w, o, **dd: MaxAverage(w, False, **dd), "learnt mixture of maximum and mean", _LEE),
    "gated": Layer(lambda c, w, o, **dd: MaxAverage(w, True, **dd), "mixture that depends on the window", _LEE),
}


def check_layer(name: str, site: str = "layer") -> str:
    """``name`` if ``LAYERS`` has it.

    Raises:
        ValueError: it has not; the message has the nearest and all names.
    """
    if name not in LAYERS:
        near = difflib.get_close_matches(str(name), LAYERS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"{site}: unknown downsampling layer {name!r}{hint} Known: {', '.join(LAYERS)}")
    return name


def make_layer(
    name: str,
    channels: int,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int | None = None,
    options: LogitOptions | None = None,
    **dd: Any,
) -> nn.Module:
    """A layer of ``LAYERS`` for (B, channels, H, W); ``dd``: device and dtype of its parameters.

    Raises:
        ValueError: unknown name, or a window that the layer cannot have.
    """
    check_layer(name)
    for value in (channels, kernel_size, stride, padding or 0):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}: channels, kernel_size, stride and padding are integers, not {value!r}")
    window = Window(kernel_size, stride, (kernel_size - 1) // 2 if padding is None else padding)
    # A window's centre and its stride x stride mean have to lie in the map; sums over the window may be cut off.
    inside = name in {"strided", "strided_average"}
    smallest = 2 if name == "blur" else 1
    if kernel_size < smallest or stride < 1 or not 0 <= window.padding <= (kernel_size - inside) // 2:
        raise ValueError(f"{name}: kernel_size {kernel_size}, stride {stride}, padding {window.padding} do not fit")
    return LAYERS[name].build(channels, window, options or LogitOptions(), **dd)
