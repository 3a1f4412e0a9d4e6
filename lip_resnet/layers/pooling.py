"""Downsampling layers: LIP, and those it is compared with, behind one interface.

Every layer maps features (B, C, H, W) to (B, C, h, w), h = floor((H + 2 * padding - kernel_size) / stride) + 1, and is
built by ``make_layer(name, channels, kernel_size, stride, padding)``; ``DOWNSAMPLING`` is the table of names. Most
layers are the mean of a window weighted by an importance F(x) > 0, given by its logarithm, the logits:

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

from lip_resnet.layers.logits import GATE, BottleneckHead, BottleneckLogits, ProjectionLogits, SimplifiedLogits
from lip_resnet.ops.lip import lip2d

# torch.fx cannot trace shape checks, so the operator and the modules registered below are leaves of a traced graph.
register_notrace_function(lip2d)


class LIP2d(nn.Module):
    """x (B, C, H, W) -> (B, C, h, w): ``lip2d(x, G(x))`` with a learnt logit module G.

    Args:
        logits: the logit module G. Its last convolution must be called ``conv``; it is initialised to zero, so that
            LIP starts as average pooling.
        kernel_size, stride, padding: of the window, in positions; the default padding is (kernel_size - 1) // 2.

    Raises:
        ValueError: kernel_size below stride. The windows must cover every position (paper, section 3); ``lip2d`` itself
            allows gaps, as avg_pool2d does.
    """

    def __init__(self, logits: nn.Module, kernel_size: int = 3, stride: int = 2, padding: int | None = None) -> None:
        super().__init__()
        if kernel_size < stride:
            raise ValueError(
                f"LIP: kernel_size {kernel_size} is smaller than stride {stride}, so no window sees the positions in "
                f"between; kernel_size must be at least {stride}"
            )
        self.logits = logits
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = (kernel_size - 1) // 2 if padding is None else padding
        self.recompute = False
        """Recompute the logits in the backward pass instead of saving them: less memory, a second forward of G."""
        self.zero_logits()

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        """Pool ``x``; a ``BottleneckHead`` computes the logits from ``trunk`` (B, width, H, W), others from ``x``."""
        source = x
        if isinstance(self.logits, BottleneckHead):
            assert trunk is not None, "a BottleneckHead needs the trunk's features"
            source = trunk
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._pool, x, source, use_reentrant=False)
        return self._pool(x, source)

    def _pool(self, x: Tensor, source: Tensor) -> Tensor:
        return lip2d(x, self.logits(source), self.kernel_size, self.stride, self.padding)

    def zero_logits(self) -> None:
        """Zero the logit module's last convolution: the logits become constant, so LIP becomes average pooling."""
        for parameter in self.logits.get_submodule("conv").parameters():
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def logit_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the last convolution of every logit module; empty for a network without LIP.

    They start at zero, so the instance norm after them has zero variance and multiplies their gradient by
    1 / sqrt(eps) = 316 at step 0. Gradient norms are therefore logged with and without them.
    """
    for module in model.modules():
        if isinstance(module, LIP2d):
            yield from module.logits.get_submodule("conv").parameters()


class Window(NamedTuple):
    """A layer's window, in positions."""

    kernel_size: int
    stride: int
    padding: int

    def out(self, size: int) -> int:
        """Output size of an input of ``size`` positions."""
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1


class _WindowLayer(nn.Module):
    """Keeps the window of a layer."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window


class SoftPool(_WindowLayer):
    """lip2d(x, x): every position weighted by exp(x), G(x) = x."""

    def forward(self, x: Tensor) -> Tensor:
        return lip2d(x, x, *self.window)


@register_notrace_module
class Strided(_WindowLayer):
    """x at the centre of every window (of two centres the upper left): importance 1 on a grid, 0 off it."""

    def __init__(self, window: Window) -> None:
        super().__init__(window)
        self.first = (window.kernel_size - 1) // 2 - window.padding

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        return x[..., self.first :: self.window.stride, self.first :: self.window.stride][..., :h, :w]


@register_notrace_module
class StridedAverage(_WindowLayer):
    """The mean of stride x stride positions without overlap or padding; the kernel size sets only the output size."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = map(self.window.out, x.shape[-2:])
        return F.avg_pool2d(x, self.window.stride, ceil_mode=True, count_include_pad=False)[..., :h, :w]


class DetailPreserving(_WindowLayer):
    """Importance alpha + (d^2 + eps^2)^(lambda / 2), d = x - mean of x in 3x3, eps = 1e-3.

    alpha and lambda are positive, learnt per channel and start at 1. This is the symmetric "lite" form (mean by a box
    filter), with the mean around the input position q instead of the output position p: so the layer is a weighted
    mean of its window. Source: Saeedan et al., "Detail-Preserving Pooling in Deep Networks", CVPR 2018.
    """

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__(window)
        self.log_alpha = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))
        self.log_lambda = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        detail = x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        reward = torch.pow(detail * detail + 1e-6, torch.exp(self.log_lambda) / 2)
        return lip2d(x, torch.log(torch.exp(self.log_alpha) + reward).to(x.dtype), *self.window)


class MaxAverage(_WindowLayer):
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


class Blur(BlurPool2d):
    """timm's ``BlurPool2d`` (binomial filter, reflection padding) with the window's own kernel size and padding."""

    def __init__(self, channels: int, window: Window, device=None, dtype=None) -> None:
        super().__init__(channels, window.kernel_size, window.stride, device=device, dtype=dtype)
        self.padding = [window.padding] * 4


@dataclass(frozen=True)
class LogitOptions:
    """Options of LIP's logit modules; the other layers ignore them.

    Raises:
        ValueError: unknown module, width below 1, coefficient not positive and finite.
    """

    module: str = "bottleneck"
    """What ``lip`` means: projection, simplified or bottleneck."""
    width: int = 128
    """Channels of the bottleneck's trunk (published: 128; ablations: 64 and 256)."""
    gate: float | None = GATE
    """Upper bound of the logits; None omits the gate."""

    def __post_init__(self) -> None:
        if f"lip_{self.module}" not in DOWNSAMPLING:
            raise ValueError(f"logit module {self.module!r}; it must be projection, simplified or bottleneck")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"bottleneck width {self.width!r}; it must be an integer of at least 1")
        if self.gate is not None and not (isinstance(self.gate, int | float) and 0 < self.gate < math.inf):
            raise ValueError(f"gate coefficient {self.gate!r}; it must be a positive, finite number")


class Layer(NamedTuple):
    """An entry of ``DOWNSAMPLING``."""

    build: Callable[..., nn.Module]
    """``build(channels, window, options, device=..., dtype=...)``."""
    summary: str
    source: str


def _projection(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(ProjectionLogits(channels, **factory_kwargs), *window)


def _simplified(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(SimplifiedLogits(channels, options.gate, **factory_kwargs), *window)


def _bottleneck(channels: int, window: Window, options: LogitOptions, **factory_kwargs: Any) -> LIP2d:
    return LIP2d(BottleneckLogits(channels, options.width, options.gate, **factory_kwargs), *window)


_LIP = "Gao, Wang, Wu, ICCV 2019"
_LEE = "Lee, Gallagher, Tu, AISTATS 2016"

DOWNSAMPLING: dict[str, Layer] = {
    "lip": Layer(
        lambda c, w, o, **factory_kwargs: DOWNSAMPLING[f"lip_{o.module}"].build(c, w, o, **factory_kwargs),
        "learnt importance, with the site's published logit module (or the one asked for)",
        _LIP,
    ),
    "lip_projection": Layer(_projection, "learnt importance, logits from a 1x1 convolution", _LIP),
    "lip_simplified": Layer(_simplified, "learnt importance, logits from a 3x3 convolution, norm and gate", _LIP),
    "lip_bottleneck": Layer(_bottleneck, "learnt importance, logits from a bottleneck of three convolutions", _LIP),
    "average": Layer(
        lambda c, w, o, **factory_kwargs: nn.AvgPool2d(w.kernel_size, w.stride, w.padding, count_include_pad=False),
        "importance 1: the window's mean",
        "classical",
    ),
    "max": Layer(
        lambda c, w, o, **factory_kwargs: nn.MaxPool2d(*w), "the window's maximum, LIP's limit for a * x", "classical"
    ),
    "strided": Layer(
        lambda c, w, o, **factory_kwargs: Strided(w), "the window's centre, as in a strided convolution", "classical"
    ),
    "strided_average": Layer(
        lambda c, w, o, **factory_kwargs: StridedAverage(w), "stride x stride mean (ResNet-D)", "He et al., CVPR 2019"
    ),
    "blur": Layer(
        lambda c, w, o, **factory_kwargs: Blur(c, w, **factory_kwargs),
        "binomial low-pass filter, then sampling",
        "Zhang, ICML 2019",
    ),
    "softpool": Layer(
        lambda c, w, o, **factory_kwargs: SoftPool(w),
        "importance exp(x): G(x) = x",
        "Stergiou, Poppe, Kalliatakis, ICCV 2021",
    ),
    "detail_preserving": Layer(
        lambda c, w, o, **factory_kwargs: DetailPreserving(c, w, **factory_kwargs),
        "importance grows with the distance from the local mean",
        "Saeedan, Weber, Goesele, Roth, CVPR 2018",
    ),
    "mixed": Layer(
        lambda c, w, o, **factory_kwargs: MaxAverage(w, False, **factory_kwargs),
        "learnt mixture of maximum and mean",
        _LEE,
    ),
    "gated": Layer(
        lambda c, w, o, **factory_kwargs: MaxAverage(w, True, **factory_kwargs),
        "mixture that depends on the window",
        _LEE,
    ),
}


def check_layer(name: str, site: str = "layer") -> str:
    """Return ``name`` if it is a key of ``DOWNSAMPLING``.

    Raises:
        ValueError: it is not; the message names the nearest key and all keys.
    """
    if name not in DOWNSAMPLING:
        near = difflib.get_close_matches(str(name), DOWNSAMPLING, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"{site}: unknown downsampling layer {name!r}{hint} Known: {', '.join(DOWNSAMPLING)}")
    return name


def make_layer(
    name: str,
    channels: int,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int | None = None,
    options: LogitOptions | None = None,
    **factory_kwargs: Any,
) -> nn.Module:
    """Build a layer of ``DOWNSAMPLING``: (B, channels, H, W) -> (B, channels, h, w).

    Args:
        name: a key of ``DOWNSAMPLING``.
        channels: number of channels of the features.
        kernel_size, stride, padding: of the window, in positions; the default padding is (kernel_size - 1) // 2.
        options: of LIP's logit module.
        factory_kwargs: ``device`` and ``dtype`` of the parameters.

    Raises:
        ValueError: unknown name, or a window that the layer does not support.
    """
    check_layer(name)
    for value in (channels, kernel_size, stride, padding or 0):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}: channels, kernel_size, stride and padding are integers, not {value!r}")
    window = Window(kernel_size, stride, (kernel_size - 1) // 2 if padding is None else padding)
    # strided and strided_average read fixed positions, which must lie inside the feature map.
    fixed = name in {"strided", "strided_average"}
    smallest, most_padding = 2 if name == "blur" else 1, (kernel_size - fixed) // 2
    if kernel_size < smallest or stride < 1 or not 0 <= window.padding <= most_padding:
        raise ValueError(
            f"{name}: kernel_size {kernel_size}, stride {stride}, padding {window.padding} do not fit; kernel_size "
            f"must be at least {smallest}, stride at least 1, and padding from 0 to {max(most_padding, 0)}"
        )
    return DOWNSAMPLING[name].build(channels, window, options or LogitOptions(), **factory_kwargs)
